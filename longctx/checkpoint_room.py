"""Which checkpoints stay, and whether the disk has room for those that a run will write, before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from longctx.errors import UserError
from longctx.files import gigabytes


def check_room(
    folder: Path, there: list[int], to_come: list[int], size: int, keep: int, undecayed_until: int | None,
    keeps_best: bool,
) -> None:  # fmt: skip
    """Raises `UserError` if `folder` lacks room for checkpoints of `size` bytes of the steps `to_come`, beside `there`.

    See `more_at_once` for the others. What a signal asks to save comes on top where nothing else is saved.
    """
    disk = shutil.disk_usage(folder)
    more = more_at_once(there, to_come, keep, undecayed_until, keeps_best)
    if not disk.total or more * size <= disk.free:  # some file systems do not know their size
        return
    fewer = "a smaller checkpoint.keep, " if keep > 1 else ""
    raise UserError(
        f"{folder}: {gigabytes(disk.free)} free, {gigabytes(more * size)} needed for {more} more checkpoints of "
        f"{gigabytes(size)} at once (checkpoint.keep={keep}, the best one, the last before the learning rate falls, "
        f"and one while it is written); make room, or set {fewer}folder= to another disk, or checkpoint.every_steps=0 "
        "with checkpoint.at_end=false for none"
    )


def more_at_once(
    there: list[int], to_come: list[int], keep: int, undecayed_until: int | None, keeps_best: bool
) -> int:  # fmt: skip
    """How many checkpoints are on the disk at once, at most, beyond those of the steps `there`, in order.

    Old ones go once a newer one is whole. With `keeps_best` one more stays, as the best one may be none of `staying`.
    """
    left, most = list(there), len(there)
    for step in to_come:
        left.append(step)
        most = max(most, len(left))
        stay = staying(left, keep, undecayed_until)
        old = [s for s in left if s not in stay]
        if keeps_best:
            stay |= set(old[-1:])
        left = [s for s in left if s in stay]
    return most - len(there)


def staying(steps: list[int], keep: int, undecayed_until: int | None) -> set[int]:
    """Of the checkpoints of `steps`, in order, those that stay beside the best one: the newest `keep`, and the last one
    up to step `undecayed_until`."""
    undecayed = [step for step in steps if undecayed_until is not None and step <= undecayed_until]
    return {*steps[-keep:], *undecayed[-1:]}
