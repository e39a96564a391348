"""Signing an artifact with a key of one's own, after OpenSSF Model Signing: who vouches for it, not just what it holds.

The signature lies beside the files as `model.sig`, in the form that other tools for model signing read.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from compress import publishing, sealing, verify
from compress.errors import Corrupt, RecipeError


def sign(folder: Path, key: Path) -> Path:
    """Sign every file of an artifact with a private key (PEM, elliptic curve); the signature's path.

    Only what matches its own manifest is signed; a signature that is there already is replaced. Raises RecipeError
    for a key that cannot sign.
    """
    _require(folder, key)
    verify.verify(folder)
    from model_signing import signing

    signature = folder / sealing.SIGNATURE
    temporary = signature.with_name(f".{signature.name}{publishing.SUFFIX}")
    try:
        signer = signing.Config().use_elliptic_key_signer(private_key=key)
        signer.set_hashing_config(_hashing(temporary.name)).sign(folder, temporary)
        os.replace(temporary, signature)
    except (ValueError, TypeError, AttributeError) as error:  # as the library meets another kind of key
        raise RecipeError(f"{key} cannot sign ({_line(error)}); {_EXPECTED.format('private')}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return signature


def check(folder: Path, key: Path) -> str:
    """Check an artifact's signature with a public key, over every file; a line that says so.

    Raises RecipeError where there is no signature or the file is no public key, Corrupt where the signature is
    another key's, or where any file is not what was signed, missing or added.
    """
    _require(folder, key)
    from model_signing import verifying

    signature = folder / sealing.SIGNATURE
    if not signature.is_file():
        raise RecipeError(f"{folder}: no {sealing.SIGNATURE}; sign it with `compress sign {folder} --key KEY`")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"{key} cannot check a signature ({_line(error)}); {_EXPECTED.format('public')}") from error
    try:
        verifier.set_hashing_config(_hashing()).verify(folder, signature)
    except Exception as error:  # the library, and those that it parses and verifies with, raise many kinds
        raise Corrupt(f"{folder}: its signature does not hold under {key} ({_line(error)})") from error
    return f"{folder}: the signature holds under {key}, over every file"


_EXPECTED = "expected an unencrypted {} key in PEM, on the curve P-256, P-384 or P-521"


def _hashing(*ignored: str) -> Any:
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[sealing.SIGNATURE, *ignored], ignore_git_paths=False)


def _require(folder: Path, key: Path) -> None:
    missing = [name for name in ("model_signing", "OpenSSL") if importlib.util.find_spec(name) is None]
    if missing:
        raise RecipeError(f"signatures need {', '.join(missing)}: pip install 'compress-toolkit[sign]'")
    if not (folder / sealing.FILE).is_file():
        raise RecipeError(f"{folder}: no {sealing.FILE} here; give the folder of an artifact or of an export")
    if not key.is_file():
        raise RecipeError(f"{key}: no such file; give the key's own")


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:159] + "…"
