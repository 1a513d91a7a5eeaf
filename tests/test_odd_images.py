"""Images that decode with warnings, half images, damaged EXIF, more than 8 bits: Pillow and libjpeg's own words are the oracles."""

import subprocess
import sys


# Headers claim more pixels than fit; the grey ones of the second do, but Pillow, which is asked why it fails, unpacks all.
SHORT_OF_MEMORY = r"""
import io, resource
from functools import partial
from PIL import Image
from fastflower.image import decode, prepare
files = []
for mode, side in (("L", 9000), ("RGB", 5500)):
    file = io.BytesIO()
    Image.new(mode, (8, 8)).save(file, "JPEG")
    head, frame = file.getvalue().split(b"\xff\xc0\0")
    files.append(head + b"\xff\xc0\0" + frame[:2] + 2 * side.to_bytes(2, "big") + frame[6:])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))
for data in files:
    for call in (decode, partial(prepare, max_side=None, quality=None), partial(prepare, max_side=9, quality=None)):
        try:
            call(data)
        except MemoryError:
            print("MemoryError")
"""


def test_a_lack_of_memory_is_not_taken_for_a_damaged_image() -> None:
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=True)
    assert done.stdout == "MemoryError\n" * 6


