"""Our own certificate authorities: the manager's, and one for each project with services on other machines.

An authority's key never leaves its folder. Certificates name the addresses of one service, and what they
are good for; whoever checks them trusts nothing but this authority, so neither the system's certificates nor
a name service have a say, and services of one project are strangers to those of another.
"""

import datetime
import ipaddress
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from flops.manager.paths import write_private, write_private_json

_YEARS_OF_AUTHORITY = 10
DAYS_OF_SERVICE = 365
DAYS_OF_PROJECT = 30
"""Certificates of a project's services: new ones when a service is started with less than half of it left;
one that runs is started again for it with less than a third left."""
_DUE = 1 / 3
_BACKDATED = datetime.timedelta(hours=1)
"""Clocks of machines differ."""


@dataclass(frozen=True)
class Certificate:
    """PEM texts of a service's certificate and its private key."""

    certificate: str
    key: str


class Authority:
    """Signs certificates; the first one on a folder makes the authority's own. Safe from any thread."""

    def __init__(self, folder: Path, name: str = "FLOps authority") -> None:
        self._own_name = _name(name)  # unlike any service: equal names mean self-signed
        self._key_file = folder / "ca.key"
        self.certificate_file = folder / "ca.pem"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.certificate_file.exists():  # the key is written first, and again where that was cut off
            self._make()
        self.certificate = self.certificate_file.read_text(encoding="ascii")
        self._authority = x509.load_pem_x509_certificate(self.certificate.encode())
        key = serialization.load_pem_private_key(self._key_file.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key

    def issue(
        self,
        service: str,
        addresses: Sequence[str] = (),
        *,
        client: bool = False,
        days: float = DAYS_OF_SERVICE,
    ) -> Certificate:
        """A certificate for a server that is reached at these host names and addresses.

        Args:
            addresses: none: it is no server.
            client: it proves itself to servers.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.SERVER_AUTH] if addresses else []
        usages += [ExtendedKeyUsageOID.CLIENT_AUTH] if client else []
        begun = _begin(_name(service), self._authority.subject, key, days=days)
        if addresses:
            names = x509.SubjectAlternativeName([_general_name(address) for address in addresses])
            begun = begun.add_extension(names, critical=False)
        certificate = (
            begun.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        return Certificate(_pem(certificate), _key_pem(key))

    def issue_once(
        self,
        file: Path,
        service: str,
        addresses: Sequence[str] = (),
        *,
        client: bool = False,
        days: float = DAYS_OF_SERVICE,
    ) -> Certificate:
        """The certificate kept in a file; a new one where it is for something else, soon over, or not there.

        A specification that holds it must not change by itself.
        """
        wanted = sorted(set(addresses))
        with suppress(OSError, ValueError, KeyError):
            known = json.loads(file.read_text(encoding="utf-8"))
            same = known["addresses"] == wanted and known.get("client", False) == client
            if same and days_left(known["certificate"]) > days / 2:
                return Certificate(known["certificate"], known["key"])
        issued = self.issue(service, wanted, client=client, days=days)
        write_private_json(file, {"addresses": wanted, "client": client, **asdict(issued)})
        return issued

    def issue_files(
        self,
        name: str,
        service: str,
        addresses: Sequence[str] = (),
        *,
        client: bool = False,
        days: float = DAYS_OF_SERVICE,
    ) -> tuple[Path, Path]:
        """A new certificate and its key, as PEM files beside the authority's own."""
        issued = self.issue(service, addresses, client=client, days=days)
        folder = self.certificate_file.parent
        files = folder / f"{name}.pem", folder / f"{name}.key"
        for file, content in zip(files, (issued.certificate, issued.key), strict=True):
            write_private(file, content)
        return files

    def _make(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _begin(self._own_name, self._own_name, key, days=365 * _YEARS_OF_AUTHORITY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(
                x509.KeyUsage(
                    digital_signature=False,
                    content_commitment=False,
                    key_encipherment=False,
                    data_encipherment=False,
                    key_agreement=False,
                    key_cert_sign=True,
                    crl_sign=True,
                    encipher_only=False,
                    decipher_only=False,
                ),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        write_private(self._key_file, _key_pem(key))
        write_private(self.certificate_file, _pem(certificate))


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, days: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def is_due(file: Path, days: float) -> bool:
    """Whether whoever runs with the certificate that `Authority.issue_once` kept there needs a new one soon.

    Args:
        days: that it was issued for.
    """
    try:
        return days_left(json.loads(file.read_text(encoding="utf-8"))["certificate"]) < days * _DUE
    except (OSError, ValueError, KeyError):
        return False  # it runs with none


def days_left(certificate: str) -> float:
    """Of a certificate (PEM); negative: it is over."""
    until = x509.load_pem_x509_certificate(certificate.encode()).not_valid_after_utc
    return (until - datetime.datetime.now(datetime.UTC)).total_seconds() / 86400


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _general_name(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(address))
    except ValueError:
        return x509.DNSName(address)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode("ascii")
