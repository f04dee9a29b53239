"""What is known of a model's file without reading it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """A file at the root of a model."""

    name: str
    size: int  # bytes
    sha256: str | None = None  # as the Hub has it, for files that it keeps outside of git (LFS)
    git: str | None = None  # git's own hash of any other file on the Hub

    @property
    def hash(self) -> str | None:
        """What the Hub knows the content by; None for a file in a folder."""
        return self.sha256 or self.git
