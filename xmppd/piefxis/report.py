"""What went wrong with whom; the list is bounded, the count is not."""

from typing import Final

SHOWN: Final = 200


class Problems:
    def __init__(self) -> None:
        self.count = 0
        self.first: list[tuple[str, str]] = []  # who or which file, what

    def add(self, who: str, text: str) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((who, " ".join(text.split())[:400]))

    def lines(self) -> list[str]:
        found = [f"{who}: {text}" for who, text in self.first]
        if self.count > len(found):
            found.append(f"and {self.count - len(found)} more problems")
        return found
