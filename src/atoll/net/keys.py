"""Keys and certificates: Ed25519 identities made where they live, and the server's own certificate authority.

The server has one identity key. It signs every answer, and it is the authority that signs the certificate of the TLS
port, so that one fingerprint, which invites carry, is all a site has to know of its server. The authority signs for
this server and nobody else: a site that trusts it need not look at host names, and the server may change its name.

Certificates are RFC 5280, signed by Ed25519 (RFC 8410); the port itself uses ECDSA over P-256, made at every
start.
"""

import base64
import hashlib
import os
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from atoll.errors import InvalidArgument, RunError
from atoll.net.storage import Disk

YEARS = timedelta(days=3652)
"""How long certificates hold: the key that signs them is what is trusted, and revoking is done in the roster."""
EARLIER = timedelta(days=365)
"""How long before their making certificates begin to hold: clocks at sites may be wrong."""


def write_secret(path: Path, content: bytes) -> None:
    """Make a file that its owner alone can read; it is durable when this returns.

    Raises:
        FileExistsError: there is one already.
    """
    temporary = path.with_name(f"{path.name}.part")
    temporary.unlink(missing_ok=True)  # of a program that was killed here
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    try:
        os.link(temporary, path)  # whole or not at all, and never in the place of another
    finally:
        temporary.unlink()
    Disk(path.parent).sync_folder("")


def read_secret(path: Path) -> bytes:
    """Read a file that its owner alone can read.

    Raises:
        RunError: it is not there, or others can read or change it.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise RunError(f"{path} is not there: restore it from a backup; without it this identity is lost.") from None
    if stat.S_IMODE(found.st_mode) & 0o077 or found.st_uid != os.geteuid():
        raise RunError(
            f"{path} is a secret, but others than its owner can read or change it "
            f"(mode {stat.S_IMODE(found.st_mode):o}, owner {found.st_uid}): run `chmod 600 {path}` as its owner, and "
            "think about who has read it."
        )
    return path.read_bytes()


def key_at(path: Path, *, make: bool = False) -> Ed25519PrivateKey:
    """The private key in a file.

    Args:
        path: the file.
        make: whether to make one where there is none.

    Raises:
        RunError: it is not there, no key, or not secret.
    """
    if make and not path.exists():
        key = Ed25519PrivateKey.generate()
        write_secret(path, _private_pem(key))
        return key
    try:
        key = serialization.load_pem_private_key(read_secret(path), None)
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} holds no private key: restore it from a backup.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise RunError(f"{path} holds a key of another kind than Ed25519: restore it from a backup.")
    return key


def public_text(key: Ed25519PublicKey) -> str:
    """A public key as 43 characters."""
    return base64.urlsafe_b64encode(key.public_bytes_raw()).decode().rstrip("=")


def public_key(text: str) -> Ed25519PublicKey:
    """Undo `public_text`.

    Raises:
        InvalidArgument: it is no public key.
    """
    try:
        raw = base64.b64decode(text.encode("ascii") + b"=", altchars=b"-_", validate=True)
        key = Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise InvalidArgument("not a public key: 43 characters of base64url are.") from error
    if public_text(key) != text:
        raise InvalidArgument("not a public key in its one form.")
    return key


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 of a public key's 32 bytes, in hexadecimal digits."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def authority(key: Ed25519PrivateKey) -> bytes:
    """The certificate of a server's authority, as PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Atoll server")])
    made = _certificate(name, name, key.public_key(), authority=True).sign(key, None)
    return made.public_bytes(serialization.Encoding.PEM)


def authority_key(pem: bytes) -> Ed25519PublicKey:
    """The key of an authority's certificate, which is whole and alone.

    Raises:
        InvalidArgument: it is no such certificate, or there is anything beside it.
    """
    try:
        found = x509.load_pem_x509_certificate(pem)
        # TLS trusts every certificate of a file: a second one would be trusted without having been looked at.
        if found.public_bytes(serialization.Encoding.PEM) != pem:
            raise InvalidArgument("there is something beside the certificate.")
        key = found.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise InvalidArgument("the certificate's key is not of the kind Ed25519.")
        key.verify(found.signature, found.tbs_certificate_bytes)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InvalidArgument("not the certificate of an Atoll server.") from error
    return key


def server_context(key: Ed25519PrivateKey, folder: Path) -> ssl.SSLContext:
    """TLS 1.3 for the server's port, with a certificate that is made now.

    Args:
        key: of the authority.
        folder: where the port's key and certificate are put for the TLS library to read.
    """
    port = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.load_pem_x509_certificate(authority(key)).subject
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Atoll server port")])
    made = _certificate(subject, issuer, port.public_key(), authority=False).sign(key, None)
    path = folder / "port.pem"
    path.unlink(missing_ok=True)
    write_secret(path, _private_pem(port) + made.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(path)
    return context


def client_context(authority_pem: bytes) -> ssl.SSLContext:
    """TLS 1.3 to the one server whose authority this is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the authority signs for this server alone, whatever it is called
    alone = x509.load_pem_x509_certificate(authority_pem).public_bytes(serialization.Encoding.DER)
    context.load_verify_locations(cadata=alone)
    return context


def proxy_context(authorities: str = "") -> ssl.SSLContext:
    """TLS to a proxy, which shows a certificate for its own name. Of the server behind it this says nothing.

    Args:
        authorities: certificates of those who may have signed it, as PEM; "": those that this machine trusts.

    Raises:
        InvalidArgument: they are none.
    """
    try:
        context = ssl.create_default_context(cadata=authorities or None)
    except (ssl.SSLError, ValueError) as error:
        raise InvalidArgument("no certificates of authorities in PEM.") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: Ed25519PublicKey | ec.EllipticCurvePublicKey, *, authority: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    usage = x509.KeyUsage(
        digital_signature=not authority, key_cert_sign=authority, crl_sign=False, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + YEARS)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=0 if authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _private_pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
