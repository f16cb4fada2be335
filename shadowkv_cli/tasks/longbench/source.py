"""The benchmark's files: from the hub, an archive, a folder or one file; never unpacked to disk."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path, PurePosixPath

from shadowkv_cli.errors import ShadowKVError, UsageError
from shadowkv_cli.tasks.hub import hub_access

MAX_FILE_BYTES = 4 * 10**9
"""No file of LongBench or LongBench v2 is near it; an archive that says so is none of theirs."""


def hub_file(repository: str, name: str, *, offline: bool) -> Path:
    """A file of a dataset on the hub, from its cache if it is there.

    Raises ShadowKVError that says how to go on without the hub.
    """
    from huggingface_hub import hf_hub_download

    with hub_access(offline) as reachable:
        try:
            return Path(hf_hub_download(repository, name, repo_type="dataset"))
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            if not reachable:
                reason = "the hub cannot be asked, and there is no copy on this machine"
            raise ShadowKVError(
                f"Cannot load {name} of {repository} ({reason}): download it elsewhere and give it "
                "with --source."
            ) from error


class Source:
    """Files by name, in an archive, in a folder (or its `data/`), or one file alone."""

    def __init__(self, path: Path) -> None:
        """Raises UsageError if there is nothing to read."""
        self.path = path
        if not path.exists():
            raise UsageError(f"There is no --source {path}.")

    @property
    def name(self) -> str:
        """For the manifest: without the folders of this machine."""
        return self.path.name

    def read(self, file: str) -> bytes:
        """The content of a file, like `qasper.jsonl`.

        Raises UsageError where the source does not hold it, or it cannot be read.
        """
        try:
            if self.path.is_dir():
                return self._in_folder(file).read_bytes()
            if zipfile.is_zipfile(self.path):
                return self._in_archive(file)
            if self.path.suffix == ".zip":
                raise UsageError(f"{self.path} is no zip archive, or is cut off: download it again")
            if self.path.suffix != PurePosixPath(file).suffix:
                raise UsageError(f"{self.path} is neither a zip archive nor {file}")
            if self.path.suffix == ".jsonl" and self.path.name != file:
                raise UsageError(f"{self.path} is not {file}: choose with --tasks")
            return self.path.read_bytes()
        except UsageError as error:
            raise UsageError(f"{error}.") from None
        except OSError as error:
            raise UsageError(f"Cannot read {self.path}: {error.strerror}.") from None

    def _in_folder(self, file: str) -> Path:
        for place in (self.path / file, self.path / "data" / file):
            if place.is_file():
                return place
        raise UsageError(f"{self.path} holds no {file}: choose other --tasks, or another --source")

    def _in_archive(self, file: str) -> bytes:
        where = f"{file} in {self.path}"
        try:
            with zipfile.ZipFile(self.path) as archive:
                found = [i for i in archive.infolist() if i.filename in (file, f"data/{file}")]
                if not found:
                    raise UsageError(f"{self.path} holds no {file}: choose other --tasks")
                if found[0].file_size > MAX_FILE_BYTES:
                    raise UsageError(f"{where} would unpack to {found[0].file_size:,} bytes")
                # Reading stops at the size that the archive states, and checks the sum.
                return archive.read(found[0])
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise UsageError(f"{where} is damaged ({error}): download it again") from None
        except (RuntimeError, NotImplementedError) as error:
            raise UsageError(f"{where} cannot be unpacked ({error})") from None
