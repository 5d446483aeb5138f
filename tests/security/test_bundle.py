"""The trust bundle: which certificates may be roots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.security.bundle import TrustBundle, certificates_to_pem, parse_certificates
from parallax.security.errors import ConfigError

if TYPE_CHECKING:
    from tests.security.conftest import AsV1, Forge, Made


def test_parse_reads_what_pem_writes(bundle: TrustBundle, forge: Forge) -> None:
    two = TrustBundle((*bundle.roots, forge.authority("Other CA").certificate))
    assert TrustBundle.parse(two.pem) == two
    assert two.pem.count(b"BEGIN CERTIFICATE") == 2


def test_equal_roots_make_equal_bundles_that_can_be_dict_keys(bundle: TrustBundle) -> None:
    again = TrustBundle.parse(bundle.pem)
    assert again == bundle
    assert hash(again) == hash(bundle)


def test_parse_ignores_text_around_certificates_and_windows_line_ends(bundle: TrustBundle) -> None:
    pem = b"# our root\n" + bundle.pem.replace(b"\n", b"\r\n") + b"the end\n"
    assert TrustBundle.parse(pem) == bundle


def test_a_root_given_twice_is_one_root(bundle: TrustBundle) -> None:
    assert TrustBundle.parse(bundle.pem * 2) == bundle


def test_a_bundle_is_never_empty() -> None:
    """gRPC takes empty roots without a word and then refuses everybody."""
    with pytest.raises(ConfigError, match=r"^the trust bundle holds no certificate$"):
        TrustBundle(())


@pytest.mark.parametrize("pem", [b"", b"garbage", b"\xff\xfe\0", b"-----BEGIN CERTIFICATE-----\n"])
def test_no_certificate_at_all(pem: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^not a certificate \(PEM\), or a damaged one$"):
        TrustBundle.parse(pem)


def test_one_damaged_certificate_refuses_the_whole_file(bundle: TrustBundle) -> None:
    torn = bundle.pem[:200] + b"\n-----END CERTIFICATE-----\n"
    for pem in (torn, bundle.pem + torn, torn + bundle.pem):
        with pytest.raises(ConfigError, match=r"^not a certificate \(PEM\), or a damaged one$"):
            TrustBundle.parse(pem)


def test_a_leaf_cannot_be_a_root(forge: Forge) -> None:
    """Among the roots it would act as a CA for any name, although it says CA:FALSE."""
    for leaf in (forge(), forge(self_signed=True), forge(self_signed=True, ca=None)):
        with pytest.raises(ConfigError) as caught:
            TrustBundle((leaf.certificate,))
        assert str(caught.value) == (
            "'CN=agent-1' cannot be a root of the trust bundle: not a CA (basicConstraints lacks CA:TRUE)"
        )


def test_a_root_that_may_not_sign_certificates_is_refused(forge: Forge) -> None:
    root = forge.authority("CRL signer", key_usage=("crl_sign",)).certificate
    with pytest.raises(
        ConfigError, match=r"root of the trust bundle: not a CA \(keyUsage lacks keyCertSign\)$"
    ):
        TrustBundle((root,))


def test_a_root_without_key_usage_is_accepted_as_openssl_makes_it(forge: Forge) -> None:
    root = forge.authority("By hand", key_usage=None).certificate
    assert TrustBundle((root,)).roots == (root,)


def test_an_x509_v1_root_is_refused(root: Made, as_v1: AsV1) -> None:
    with pytest.raises(ConfigError, match=r"not a CA \(basicConstraints lacks CA:TRUE\)$"):
        TrustBundle.parse(as_v1(root, root.key).certificate.public_bytes(Encoding.PEM))


def test_one_bad_root_among_good_ones_refuses_the_bundle(bundle: TrustBundle, forge: Forge) -> None:
    pem = bundle.pem + certificates_to_pem([forge().certificate])
    with pytest.raises(ConfigError, match=r"^'CN=agent-1' cannot be a root"):
        TrustBundle.parse(pem)


def test_a_hostile_subject_does_not_forge_a_log_line(forge: Forge) -> None:
    leaf = forge(common_names=["x\n2026-01-01 ERROR forged"]).certificate
    with pytest.raises(ConfigError) as caught:
        TrustBundle((leaf,))
    assert "\n" not in str(caught.value)


def test_parse_certificates_keeps_the_order(bundle: TrustBundle, forge: Forge) -> None:
    leaf = forge().certificate
    chain = (leaf, *bundle.roots)
    assert parse_certificates(certificates_to_pem(chain)) == chain
