"""Signatures by a key of one's own, on a real artifact."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from compress import artifact, sealing, signing, verify
from compress.errors import Corrupt, RecipeError
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]


def write_keys(folder: Path, name: str, key, password: bytes | None = None) -> tuple[Path, Path]:
    """The private and the public half, in PEM."""
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(serialization.Encoding.PEM, form)
    paths = folder / f"{name}.pem", folder / f"{name}.pub"
    for path, text in zip(paths, (private, public), strict=True):
        path.write_bytes(text)
    return paths


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("keys")
    made = {
        "mine": ec.generate_private_key(ec.SECP256R1()),
        "other": ec.generate_private_key(ec.SECP384R1()),
        "rsa": rsa.generate_private_key(65537, 2048),
    }
    found = {name: write_keys(folder, name, key) for name, key in made.items()}
    return found | {"locked": write_keys(folder, "locked", made["mine"], b"secret")}


@pytest.fixture
def signed(keys, tmp_path) -> Path:
    artifact.save(tiny_model(), tmp_path / "a")
    assert signing.sign(tmp_path / "a", keys["mine"][0]) == tmp_path / "a" / "model.sig"
    return tmp_path / "a"


def test_a_signature_holds_under_its_own_key_alone(signed, keys):
    assert "the signature holds" in signing.check(signed, keys["mine"][1])
    with pytest.raises(Corrupt, match="does not hold under .*other.pub"):
        signing.check(signed, keys["other"][1])
    assert verify.verify(signed)[1:] == [
        f"{signed}/model.sig: a signature, which `compress verify {signed} --key KEY` checks"
    ]
    signing.sign(signed, keys["other"][0])  # replaces the first
    assert "the signature holds" in signing.check(signed, keys["other"][1])
    assert not list(signed.glob(".*"))


def test_every_change_breaks_it_even_one_that_is_sealed_anew(signed, keys):
    rng = random.Random(3)
    public = keys["mine"][1]
    files = sorted(p for p in signed.iterdir() if p.name != sealing.SIGNATURE)
    for i in range(60):
        path = files[i % len(files)]
        before = path.read_bytes()
        raw = bytearray(before)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(raw)
        with pytest.raises(Corrupt, match="Hash mismatch"):
            signing.check(signed, public)
        path.write_bytes(before)
    assert signing.check(signed, public)
    facts = sealing.read(signed)
    sealing.write(signed, {**facts, "name": "forged"})
    assert verify.verify(signed)  # the seal protects against damage alone
    with pytest.raises(Corrupt, match=sealing.FILE):
        signing.check(signed, public)
    sealing.write(signed, facts)
    (signed / "more.txt").write_text("mine")
    with pytest.raises(Corrupt, match="more.txt"):
        signing.check(signed, public)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\x00\xff"])
def test_a_damaged_signature_is_corrupt(signed, keys, damage):
    (signed / sealing.SIGNATURE).write_bytes(damage)
    with pytest.raises(Corrupt, match="does not hold"):
        signing.check(signed, keys["mine"][1])


def test_what_cannot_sign_or_check_is_said(signed, keys, tmp_path):
    before = (signed / sealing.SIGNATURE).read_bytes()
    for key in (keys["rsa"][0], keys["mine"][1], keys["locked"][0]):
        with pytest.raises(RecipeError, match="cannot sign .*expected an unencrypted private key in PEM"):
            signing.sign(signed, key)
    for key in (keys["rsa"][1], keys["mine"][0]):
        with pytest.raises((RecipeError, Corrupt), match=key.name):
            signing.check(signed, key)
    with pytest.raises(RecipeError, match="no such file"):
        signing.sign(signed, tmp_path / "absent.pem")
    with pytest.raises(RecipeError, match="no compression.json here"):
        signing.sign(tmp_path, keys["mine"][0])
    assert (signed / sealing.SIGNATURE).read_bytes() == before and not list(signed.glob(".*"))
    (signed / sealing.SIGNATURE).unlink()
    with pytest.raises(RecipeError, match="no model.sig; sign it with"):
        signing.check(signed, keys["mine"][1])
    (signed / "config.json").write_text("{}")
    with pytest.raises(Corrupt, match="config.json"):  # what is damaged is not signed
        signing.sign(signed, keys["mine"][0])


def test_the_commands_sign_and_check(signed, keys):
    def command(*words: object) -> subprocess.CompletedProcess[str]:
        start = [sys.executable, "-c", "from compress.cli import main; main()"]
        return subprocess.run([*start, *map(str, words)], capture_output=True, text=True, cwd=ROOT)

    (signed / sealing.SIGNATURE).unlink()
    done = command("sign", signed, "--key", keys["mine"][0])
    assert done.returncode == 0 and done.stdout.startswith(f"{signed}/model.sig: checked by"), done.stderr
    done = command("verify", signed, "--key", keys["mine"][1])
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith("over every file"), done.stderr
    done = command("verify", signed, "--key", keys["other"][1])
    assert done.returncode == 8 and len(done.stderr.splitlines()) == 1 and not done.stdout
