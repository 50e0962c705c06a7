"""A run of a benchmark that has so many seconds: parts in order of worth, each guarded and boxed in time."""

import contextlib
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from _shared import OutOfTime, alarm, header, progress, write


class Session:
    """Lines of JSON as they come, a file that always holds all so far, and a table at the end.

    Args:
        device: Where to measure.
        seconds: For everything.
        output: The file of results; ``None`` for none.
    """

    def __init__(self, device: torch.device, seconds: float, output: Path | None) -> None:
        self.device, self.output = device, output
        self.cuda = device.type == "cuda"
        self.tiny = not self.cuda
        self.name = torch.cuda.get_device_name() if self.cuda else "cpu"
        self._end = time.perf_counter() + seconds
        self._part_end = self._end
        self._part = ""
        self.result: dict[str, Any] = {**header("lightning", "timm"), "device": self.name, "lines": []}

    def left(self) -> float:
        """Seconds that are left of the part, and so of everything."""
        return min(self._end, self._part_end) - time.perf_counter()

    def say(self, what: str, **fields: Any) -> None:
        """A result: printed, and written."""
        line = {"part": self._part, "what": what, **_rounded(fields)}
        print(json.dumps(line), flush=True)
        self.result["lines"].append(line)
        write(self.result, self.output)

    def sync(self) -> None:
        """Waits until the device has done what it was asked to do."""
        if self.cuda:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def guarded(self, what: str, tidy: bool = True) -> Iterator[None]:
        """An exception inside is a line of the results, not the end.

        Args:
            what: Is named in that line.
            tidy: Whether to give memory of the device back at the end, which takes a while.
        """
        try:
            yield
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames)]
            self.say(what, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", at=where)
        finally:
            if tidy and self.cuda:
                gc.collect()
                torch.cuda.empty_cache()

    def run(self, parts: Mapping[str, tuple[Callable[["Session"], None], float]]) -> None:
        """Runs each part for at most its share of the time, and shows the table.

        Args:
            parts: By name, what to call and its share of all seconds; what one leaves is there for the others.
        """
        whole = self.left()
        for name, (work, share) in parts.items():
            progress(name)
            self._part, self._part_end, began = name, self._end, time.perf_counter()
            if self.left() < 0.02 * whole:
                self.say("skipped", left=self.left())
                continue
            self._part_end = time.perf_counter() + min(self.left(), share * whole)
            over = False
            try:
                with alarm(self.left()), self.guarded("the whole part"):
                    work(self)
            except OutOfTime:
                over = True
            self._part_end = self._end
            self.say("time", seconds=time.perf_counter() - began, left=self.left(), cut_off=over)
        self._table()

    def _table(self) -> None:
        print(f"\n{self.name}", file=sys.stderr)
        for line in self.result["lines"]:
            rest = {key: value for key, value in line.items() if key not in ("part", "what", "table", "at")}
            print(f"{line['part']:10} {line['what']}: {rest or ''}", file=sys.stderr)
            for name, row in line.get("table", {}).items():
                print(f"{'':14}{name:34} {row}", file=sys.stderr)

    # ---- timing

    def timed(self, work: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
        """Medians in milliseconds, all taking turns: on the device, until the call returns, until it is done."""
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in work}
        rounds = 1 if self.tiny else rounds
        end, broken = time.perf_counter() + min(seconds, self.left()), set()
        for number in range(rounds + 1):
            if number > 3 and time.perf_counter() > end:
                break
            for name, function in work.items():
                if name in broken:
                    continue
                broken.add(name)
                with self.guarded(name, tidy=False):
                    once = self._once(function)
                    broken.remove(name)
                    if number:
                        times[name].append(once)
        columns = ("device", "host", "wall")
        return {
            name: dict(zip(columns, map(statistics.median, zip(*values, strict=True)), strict=True))
            for name, values in times.items()
            if values
        }

    def _once(self, function: Callable[[], Any]) -> tuple[float, float, float]:
        self.sync()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []
        start = time.perf_counter()
        if events:
            events[0].record()
        function()
        if events:
            events[1].record()
        host = 1e3 * (time.perf_counter() - start)
        self.sync()
        wall = 1e3 * (time.perf_counter() - start)
        return (events[0].elapsed_time(events[1]) if events else wall), host, wall


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value if isinstance(value, int | str | None) else str(value)
