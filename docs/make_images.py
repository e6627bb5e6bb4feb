"""Makes the pictures of the README from the shipped clip and weights: `python docs/make_images.py`.

Out: `docs/images/update_mask.png`, the 40th frame of the clip with the sites tinted at which the
network's input was taken anew, in 128 colours so that it stays small.
"""

from itertools import islice
from pathlib import Path

from PIL import Image

from deltafx import models_zoo
from deltafx.comparison import Comparison
from deltafx.report import draw_mask
from deltafx.video import VideoReader

TARGET = Path(__file__).parent / "images" / "update_mask.png"
FRAMES = 40


def main() -> None:
    with VideoReader(str(models_zoo.clip_path("vtest"))) as reader:
        frames = list(islice(reader, FRAMES))
    comparison = Comparison(models_zoo.load("mobilenet_v2_trunk"), frames[0], compare=False)
    record = None
    for frame in frames:
        record = comparison.step(frame)
    assert record is not None
    caption = f"{record.flop_fraction:.0%} of the multiply-adds"
    picture = Image.fromarray(draw_mask(frames[-1], comparison.mask(), caption))
    picture.quantize(128, dither=Image.Dither.NONE).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
