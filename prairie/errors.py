"""The exception tree. Every message is one sentence that says what happened, was got, was wanted, and the mend.

    raise DataError("row 17 of chats.jsonl has no assistant turn", got="roles user, user",
                    wanted="at least one assistant message", mend="remove the row or add the answer")

A command prints the sentence and leaves with `exit_code`; the server answers with `http_status` and an error object.
"""

from __future__ import annotations


class PrairieError(Exception):
    """Root of all errors that a user may meet; its text is meant to be read by that user."""

    exit_code = 1
    http_status = 400
    code = "invalid_request"

    def __init__(
        self, what: str, *, got: object = None, wanted: object = None, mend: str | None = None, param: str | None = None
    ) -> None:
        self.what, self.got, self.wanted, self.mend, self.param = what, got, wanted, mend, param
        facts = [f"{word} {value}" for word, value in (("got", got), ("wanted", wanted)) if value is not None]
        sentence = what + (f": {', '.join(facts)}" if facts else "") + (f"; {mend}" if mend else "")
        super().__init__(sentence if sentence.endswith((".", "?", "!")) else sentence + ".")


class UsageError(PrairieError):
    """The command line itself is wrong."""

    exit_code = 2


class RecipeError(PrairieError):
    """A recipe, a stage or a key of it cannot be used."""

    code = "invalid_recipe"


class DataError(PrairieError):
    """A file, a row or a whole dataset cannot be used."""

    code = "invalid_data"


class TokenizerError(PrairieError):
    """A tokenizer is missing, damaged or does not fit the model."""

    code = "invalid_tokenizer"


class TemplateError(PrairieError):
    """A chat template cannot be parsed, rendered or trained on."""

    code = "invalid_template"


class ModelError(PrairieError):
    """Weights or config of a model are missing, damaged, contradictory or of an unknown family."""

    code = "invalid_model"


class AdapterError(ModelError):
    """An adapter is damaged or stands on another base."""

    code = "invalid_adapter"


class TrainingError(PrairieError):
    """A training run must stop: non-finite loss or gradient, changed data at resume, settings a model cannot take."""

    code = "training_failed"


class CheckpointError(TrainingError):
    """No checkpoint can be read, or it belongs to another run."""


class StoreError(PrairieError):
    """The store cannot be opened, read or written."""

    http_status = 500
    code = "store_error"


class StorageFullError(StoreError):
    """The disk is full or not writable; nothing half-written is left."""

    http_status = 507
    code = "storage_full"


class BusyError(PrairieError):
    """Another process holds the thing: a store's run lock, a port."""

    http_status = 409
    code = "busy"


class NotFoundError(PrairieError):
    """No such model, response, stage, task or file."""

    http_status = 404
    code = "not_found"


class RequestError(PrairieError):
    """A request to the engine or the server cannot be served as it stands."""


class ContextLengthError(RequestError):
    """The prompt is longer than the model's context."""

    code = "context_length_exceeded"


class ConflictError(RequestError):
    """The same idempotency key came with another body."""

    http_status = 409
    code = "conflict"


class GameError(PrairieError):
    """A game cannot go on: an engine is missing, has died, hangs or answers nonsense."""

    code = "game_error"


class AuthError(PrairieError):
    """No API key, or a wrong one."""

    http_status = 401
    code = "invalid_api_key"


class OverloadedError(PrairieError):
    """The queue is full; try again later."""

    http_status = 429
    code = "overloaded"
