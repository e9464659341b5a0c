"""The state of an answer's feedback, as the chat page asks for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prairie.store.home import Home


def feedback_of(home: Home, response_id: str) -> dict[str, Any]:
    """The answer's state, every event on it and those that count now. Raises NotFoundError."""
    from sqlalchemy import select

    from prairie.store.feedback import FeedbackEvent, current_view
    from prairie.store.schema import FEEDBACK_EVENTS

    response = home.feedback.get_response(response_id)
    query = select(FEEDBACK_EVENTS).where(FEEDBACK_EVENTS.c.response_id == response_id).order_by(FEEDBACK_EVENTS.c.seq)
    with home.database.read() as connection:
        rows = list(connection.execute(query).mappings())
    events = [FeedbackEvent(**{key: row[key] for key in FeedbackEvent.__dataclass_fields__}) for row in rows]
    return {
        "object": "feedback.state",
        "response_id": response_id,
        "status": response.status,
        "model": response.model,
        "line": response.line,
        "artifact_id": response.version_id,
        "finish_reason": response.finish_reason,
        "current": [event.to_json() for event in current_view(events)],
        "events": [event.to_json() for event in events],
    }
