"""API keys: shown once, hashed, and a door that stays shut."""

import pytest
from sqlalchemy import select

from prairie.errors import AuthError, ConflictError, NotFoundError, RequestError
from prairie.store.schema import API_KEYS


def test_no_key_is_needed_until_one_was_made(home):
    assert not home.keys.required()
    assert home.keys.check(None) is None
    assert home.keys.check("anything") is None


def test_a_key_is_shown_once_and_kept_as_a_hash(home):
    secret = home.keys.create("phone")
    assert len(secret) > 40
    assert home.keys.check(secret) == "phone"
    home.database.scrub()
    if home.url is None:
        assert secret.removeprefix("prairie-").encode() not in (home.root / "prairie.db").read_bytes()
    with home.database.read() as connection:
        assert secret.removeprefix("prairie-") not in str(connection.execute(select(API_KEYS)).all())
    assert [(k.name, k.revoked) for k in home.keys.all()] == [("phone", None)]
    for wrong in (None, "", secret[:-1], secret + "x", "prairie-"):
        with pytest.raises(AuthError, match="wants an API key"):
            home.keys.check(wrong)


def test_revoking(home):
    first = home.keys.create("phone")
    with pytest.raises(ConflictError, match="there is a valid key named `phone`"):
        home.keys.create("phone")
    home.keys.revoke("phone")
    with pytest.raises(NotFoundError):
        home.keys.revoke("phone")
    with pytest.raises(AuthError):
        home.keys.check(first)
    with pytest.raises(AuthError):  # the last key is gone: shut, not open
        home.keys.check(None)
    second = home.keys.create("phone")
    assert home.keys.check(second) == "phone"
    home.keys.revoke(home.keys.all()[-1].id)
    with pytest.raises(AuthError):
        home.keys.check(second)


def test_a_key_needs_a_name(home):
    for name in ("", "  ", "x" * 201):
        with pytest.raises(RequestError):
            home.keys.create(name)
