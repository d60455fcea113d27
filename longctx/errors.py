"""The errors that a user can mend: shown as their message alone, without a trace."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: shown as its message alone, without a trace."""


class ConfigError(UserError):
    """A configuration that cannot run: every problem, each with the value, the rule and the fix."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in this run's configuration:", *(f"  - {p}" for p in problems)]))


class DataError(UserError):
    """Data that cannot be trained on: the message names the file, what is wrong and what to do."""
