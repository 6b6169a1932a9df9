"""The primitives through the functions we call: published vectors."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from atoll.secagg.primitives import agree, derive, digest, encoded, hkdf, seal, stream, unseal, verified


def raw(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


SUNSCREEN = b"".join(
    (
        b"Ladies and Gentlemen of the class of '99: ",
        b"If I could offer you only one tip for the future, sunscreen would be it.",
    )
)


@pytest.mark.parametrize(
    ("private", "public", "secret"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
            "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
            "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
        ),
    ],
)
def test_x25519_rfc_7748(private: str, public: str, secret: str) -> None:
    assert agree(X25519PrivateKey.from_private_bytes(raw(private)), raw(public)) == raw(secret)


@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little"), (2**255 - 20).to_bytes(32, "little")])
def test_keys_of_small_order_give_no_secret(point: bytes) -> None:
    with pytest.raises(ValueError, match=r".*"):
        agree(X25519PrivateKey.generate(), point)


@pytest.mark.parametrize(
    ("secret", "salt", "info", "length", "key"),
    [
        ("0b" * 22, "000102030405060708090a0b0c", "f0f1f2f3f4f5f6f7f8f9", 42,
         "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865"),
        ("0b" * 22, "", "", 42,
         "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"),
    ],
)  # fmt: skip
def test_hkdf_rfc_5869(secret: str, salt: str, info: str, length: int, key: str) -> None:
    assert hkdf(raw(secret), raw(salt), raw(info), length) == raw(key)


def test_chacha20_rfc_8439_section_2_4_2() -> None:
    nonce = (1).to_bytes(4, "little") + raw("000000000000004a00000000")
    assert stream(bytes(range(32)), nonce).update(SUNSCREEN) == raw(
        "6e2e359a2568f98041ba0728dd0d6981e97e7aec1d4360c20a27afccfd9fae0bf91b65c5524733ab8f593dabcd62b357"
        "1639d624e65152ab8f530c359f0861d807ca0dbf500d6a6156a38e088a22b65e52bc514d16ccf806818ce91ab7793736"
        "5af90bbf74a35be6b40b8eedf2785e42874d"
    )


def test_chacha20_poly1305_rfc_8439_section_2_8_2() -> None:
    key, nonce, aad = bytes(range(0x80, 0xA0)), raw("070000004041424344454647"), raw("50515253c0c1c2c3c4c5c6c7")
    sealed = raw(
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d63dbea45e8ca9671282fafb69da92728b"
        "1a71de0a9e060b2905d6a5b67ecd3b3692ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
        "3ff4def08e4b7a9de576d26586cec64b6116 1ae10b594f09e26a7e902ecbd0600691"
    )
    assert seal(key, SUNSCREEN, aad, nonce) == sealed
    assert unseal(key, sealed, aad, nonce) == SUNSCREEN
    assert unseal(key, sealed, aad + b"x", nonce) is None
    assert unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), aad, nonce) is None


def test_ed25519_rfc_8032_test_2() -> None:
    key = Ed25519PrivateKey.from_private_bytes(raw("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    public = raw("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    signature = raw(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    assert key.public_key().public_bytes_raw() == public
    assert key.sign(b"\x72") == signature
    assert verified(public, signature, b"\x72")
    assert not verified(public, signature, b"\x73")
    assert not verified(public, bytes(64), b"\x72")
    assert not verified(b"\xff" * 32, signature, b"\x72")


def test_labels_and_parts_never_share_an_input() -> None:
    parts: list[tuple[bytes | str | int, ...]] = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc")]
    assert len({encoded(*p) for p in parts}) == len(parts)
    assert digest("one", b"x") != digest("other", b"x")
    secret, session = bytes(32), bytes([1]) * 32
    assert derive(secret, session, "own mask") != derive(secret, session, "pair mask")
    assert derive(secret, session, "pair mask", 1, 2) != derive(secret, session, "pair mask", 12)
    assert derive(secret, session, "own mask") != derive(secret, bytes(32), "own mask")
