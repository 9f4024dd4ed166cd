"""What is it: python examples/classify_image.py MODEL.onnx LABELS.txt PICTURE [MEAN SCALE]

Pixels are (value - MEAN) / SCALE, by default (value - 127) / 128, as EfficientNet-Lite wants them.
Needs Pillow (`pip install pillow`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import headrace


def main() -> None:
    if len(sys.argv) not in (4, 6):
        sys.exit(__doc__)
    model, labels, picture, *scaling = sys.argv[1:]
    mean, scale = map(float, scaling or (127, 128))
    with headrace.load(model) as network:
        (port,) = network.inputs  # [batch, 3, height, width]
        height, width = port.shape[2:]
        image = Image.open(picture).convert("RGB").resize((width, height))
        pixels = (np.asarray(image, np.float32) - mean) / scale
        (scores,) = network({port.name: pixels.transpose(2, 0, 1)[None]}).values()
    shares = np.exp(scores[0] - scores[0].max())
    shares /= shares.sum()
    names = Path(labels).read_text(encoding="utf-8").splitlines()
    names = names[-len(shares) :]  # some lists have "background" in front
    for i in np.argsort(-shares)[:5]:
        print(f"{shares[i]:6.1%}  {names[i]}")


if __name__ == "__main__":
    main()
