"""A ball bounces across a framebuffer, and the screen is redrawn only where the framebuffer was written.

Two readers watch the same memory, each with a cursor and a pace of its own: the screen, after every frame, and an
autosave, now and then. What one of them has collected, the other still gets.
"""

from __future__ import annotations

import argparse
import mmap
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pagemapcompat import DirtyTracker, KernelError

try:
    from PIL import Image
except ImportError:
    sys.exit("redraw.py writes its pictures with Pillow, which is not installed: pip install 'pagemapcompat[demo]'")

if TYPE_CHECKING:
    from pagemapcompat import Cursor

WIDTH, HEIGHT = 1024, 600
STRIDE = 4 * WIDTH
"""In bytes: a pixel is red, green, blue and one that nobody looks at."""
RADIUS = 32
SKY, GRASS, BALL = b"\x87\xce\xeb\0", b"\x3a\x7d\x2c\0", b"\xc8\x28\x32\0"
MEBIBYTE = 1 << 20


class Game:
    """What draws: it knows nothing of who looks."""

    def __init__(self) -> None:
        self.framebuffer = mmap.mmap(-1, STRIDE * HEIGHT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._x, self._y, self._dx, self._dy = 100, 100, 13, 7

    def draw_landscape(self) -> None:
        """The sky above, the grass below."""
        for y in range(HEIGHT):
            self._line(0, y, WIDTH, self._backdrop(y))

    def draw_frame(self) -> None:
        """Erase the ball and draw it a little further."""
        self._ball(erase=True)
        self._x += self._dx
        self._y += self._dy
        if not RADIUS <= self._x + self._dx <= WIDTH - RADIUS:
            self._dx = -self._dx
        if not RADIUS <= self._y + self._dy <= HEIGHT - RADIUS:
            self._dy = -self._dy
        self._ball(erase=False)

    def _ball(self, *, erase: bool) -> None:
        for y in range(-RADIUS, RADIUS):
            half = int((RADIUS**2 - y**2) ** 0.5)
            self._line(self._x - half, self._y + y, 2 * half, self._backdrop(self._y + y) if erase else BALL)

    def _line(self, x: int, y: int, pixels: int, colour: bytes) -> None:
        at = y * STRIDE + 4 * x
        self.framebuffer[at : at + 4 * pixels] = colour * pixels

    @staticmethod
    def _backdrop(y: int) -> bytes:
        return SKY if y < HEIGHT * 3 // 4 else GRASS


class Copy:
    """A copy of some memory that is brought up to date by copying what its cursor says was written."""

    def __init__(self, memory: mmap.mmap, cursor: Cursor) -> None:
        self.content = bytearray(len(memory))
        self.copied = self.updates = 0
        self._memory = memory
        self._cursor = cursor

    def update(self) -> None:
        """Copy what was written since the last update."""
        for lo, hi in self._cursor.collect().spans():
            self.content[lo:hi] = self._memory[lo:hi]
            self.copied += hi - lo
        self.updates += 1

    def equals_memory(self) -> bool:
        """Compare all of it."""
        return self.content == self._memory[:]

    def __str__(self) -> str:
        """How much it copied."""
        whole = self.updates * len(self.content)
        return (
            f"{self.updates} updates copied {self.copied / MEBIBYTE:.1f} MiB of {whole / MEBIBYTE:.1f}, "
            f"{self.copied / whole:.0%}"
        )


def save_picture(pixels: bytearray, path: Path) -> None:
    """Write a PNG file."""
    Image.frombytes("RGB", (WIDTH, HEIGHT), bytes(pixels), "raw", "RGBX").save(path)
    print(f"  {path}")


def play(tracker: DirtyTracker, frames: int, every: int, out: Path) -> bool:
    """Draw, redraw, save. Whether both copies were equal to the memory after each of their updates."""
    game = Game()
    with tracker.track(game.framebuffer) as ram:
        screen = Copy(game.framebuffer, ram.cursor())
        autosave = Copy(game.framebuffer, ram.cursor())
        game.draw_landscape()
        right = True
        for frame in range(1, frames + 1):
            game.draw_frame()
            screen.update()
            right &= screen.equals_memory()
            if frame % every == 0 or frame == frames:
                autosave.update()
                right &= autosave.equals_memory()
            if frame in {1, (frames + 1) // 2, frames}:
                save_picture(screen.content, out / f"frame-{frame:03}.png")
    print(f"Screen:   {screen}.\nAutosave: {autosave}.")
    print("(The first update of each copied the whole landscape.)")
    return right


def main() -> int:
    """Run it. 0 if the copies were right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto", choices=("auto", "pagemap-scan", "uffd-wp"))
    parser.add_argument("--frames", type=int, default=60, help="how many to draw (60)")
    parser.add_argument("--every", type=int, default=20, help="save after so many frames, and after the last (20)")
    parser.add_argument("--out", type=Path, help="the directory for the pictures (a new temporary one)")
    options = parser.parse_args()
    if min(options.frames, options.every) < 1:
        parser.error("all numbers are 1 or more")
    try:
        tracker = DirtyTracker(options.backend)
    except KernelError as error:
        print(f"This does not work here: {error.strerror}" + (f"\n  remedy: {error.hint}" if error.hint else ""))
        return 1
    with tracker:
        out = options.out or Path(tempfile.mkdtemp(prefix="redraw-"))
        out.mkdir(parents=True, exist_ok=True)
        print(f"Backend {tracker.selection.chosen}, {options.frames} frames of {WIDTH} x {HEIGHT}. The screen showed:")
        right = play(tracker, options.frames, options.every, out)
    print("After every update, the copy was equal to the memory." if right else "A copy DIFFERED from the memory.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
