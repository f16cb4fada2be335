"""Every known way in which a model cannot be loaded, as one line with the way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.run_config import ModelChoice
from shadowkv_cli.tasks.hub import hub_access


@contextmanager
def explained(choice: ModelChoice) -> Iterator[bool]:
    """Turn the errors of loading a model into UsageError or ShadowKVError.

    Yields whether only local files may be used: asked for, or the hub is out of reach.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    from safetensors import SafetensorError

    name = choice.name
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UsageError(f"The folder {name} holds no model: it has no config.json.")
    if not folder.is_dir() and name.startswith(("/", "./", "../", "~")):
        raise UsageError(f"There is no folder {name}.")
    local = folder.is_dir()
    with hub_access(choice.offline or local) as online:
        try:
            yield not online
        except GatedRepoError:
            raise ShadowKVError(
                f"No access to {name}: accept its licence on its hub page and log in with "
                "`hf auth login`, or give a local folder."
            ) from None
        except RepositoryNotFoundError:
            raise UsageError(
                f"There is no model {name} on the hub, nor a folder of that name."
            ) from None
        except HfHubHTTPError as error:
            raise ShadowKVError(f"The hub refused {name}: {one_line(error)}") from None
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = one_line(error)
            if "trust_remote_code" in reason:
                reason = "it runs its own code: allow it with --trust-remote-code"
            elif not local and not online:
                reason = (
                    "it is not on this machine, and the hub "
                    + ("was not asked (--offline)" if choice.offline else "cannot be reached")
                    + ": give a local folder, or use --model demo"
                )
            elif isinstance(error, SafetensorError):
                reason = f"its safetensors are cut off or damaged ({reason}): fetch them again"
            elif "safetensors" in reason:
                reason = "it has no safetensors; other formats run code, see --trust-remote-code"
            raise ShadowKVError(f"Cannot load the model {name}: {reason}.") from None


def one_line(error: Exception) -> str:
    """An error's text without line breaks, shortened."""
    return " ".join(str(error).split())[:300].rstrip(".")
