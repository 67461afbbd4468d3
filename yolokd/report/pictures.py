"""What the report shows of its images: photographs with boxes over them, and maps beside them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as Pillow

from yolokd.report.seen.maps import MAP_KINDS, Array, LevelMaps
from yolokd.report.seen.samples import Boxes, Frame, Sample
from yolokd.runtime.plots import import_matplotlib

PHOTO, QUALITY = 560, 80  # ours: the longer side of a photograph in pixels, and JPEG's quality
TOLERANCE = 0.25  # ours: how far a simplified outline may be from its mask's, in pixels of the models' square
KEYPOINT, DIAMOND = 0.01, np.array([(0, -1), (1, 0), (0, 1), (-1, 0)])  # ours: a keypoint's size, of the square's side
PERCENTILE = 99.5  # ours: a map's brightest color stands for this percentile, so that one peak does not darken the rest


@dataclass(frozen=True)
class MapGroup:
    """Maps of one idea, with the words that explain them.

    method: whose idea it is; empty for none. maps: names of maps. shows: what one sees. good: what is good. colors: of
    matplotlib. number: what the number below a map is.
    """

    title: str
    method: str
    maps: tuple[str, ...]
    shows: str
    good: str
    colors: str
    number: str

    def columns(self, has_before: bool) -> list[tuple[str, str, str]]:
        """Return (name of a map, `before` or `after`, heading) of each map of an image, from left to right."""
        columns = []
        for name in self.maps:
            if MAP_KINDS[name].models == "teacher":
                columns.append((name, "after", HEADINGS[name]))
                continue
            moments = ("before", "after") if has_before else ("after",)
            headings = (f"{HEADINGS[name]}, {moment}" if has_before else HEADINGS[name] for moment in moments)
            columns += [(name, moment, heading) for moment, heading in zip(moments, headings, strict=True)]
        return columns


HEADINGS = {
    "teacher_attention": "teacher", "student_attention": "student", "disparity": "disparity", "high": "split",
    "disagreement": "disagreement", "richness": "richness",
}  # fmt: skip

GROUPS = (
    MapGroup(
        "Spatial attention", "", ("teacher_attention", "student_attention"),
        "How strongly a model's feature map responds at each position, 1 being the mean of the map.",
        "After the training, the student's map looks like the teacher's.", "magma", "peak",
    ),
    MapGroup(
        "Disparity of attention", "dfd", ("disparity", "high"),
        "How far the two attentions are apart, and how DFD splits the positions by it: light where the disparity is at "
        "least the mean of the map, dark where it is below. Each side gets a loss of its own.",
        "The disparity is darker after the training than before.", "viridis", "mean",
    ),
    MapGroup(
        "Disagreement of predictions", "pdf", ("disagreement",),
        "How much the class probabilities of student and teacher differ. PDF compares features most where they do.",
        "Darker after the training. Where it stays bright, student and teacher still differ.",
        "inferno", "mean",
    ),
    MapGroup(
        "Richness", "frs", ("richness",),
        "The teacher's highest class probability at each position. FRS compares most where it is high.",
        "Bright on the objects of this level's size, dark elsewhere. A level that is dark everywhere teaches nothing.",
        "cividis", "peak",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A map of an image, (H, W), with its colors, which go from `low` to `high`, a heading, and what sums it up."""

    values: Array
    low: float
    high: float
    colors: str
    heading: str
    number: str

    @property
    def uri(self) -> str:
        """Return the map as the data URI of a PNG of H by W pixels."""
        scaled = (self.values - self.low) / max(self.high - self.low, 1e-12)
        picture = Pillow.fromarray((np.clip(scaled, 0, 1) * 255).round().astype(np.uint8), mode="P")
        picture.putpalette(_palette(self.colors).tobytes())
        target = io.BytesIO()
        picture.save(target, format="PNG", optimize=True)
        return _uri("png", target.getvalue())


def photo_uri(sample: Sample) -> str:
    """Return an image as the data URI of a JPEG; of other than three channels, the first one."""
    image = sample.image if sample.image.shape[2] == 3 else sample.image[..., :1]
    height, width = image.shape[:2]
    scale = min(PHOTO / max(height, width), 1.0)
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    if small.dtype != np.uint8:
        small = cv2.normalize(small, None, 0, 255, cv2.NORM_MINMAX, cv2.CV_8U)
    _, encoded = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    return _uri("jpeg", encoded.tobytes())


def view_box(frame: Frame) -> str:
    """Return the part of the models' square that an image fills, as SVG's viewBox."""
    return f"{frame.left} {frame.top} {frame.width} {frame.height}"


def paths(boxes: Boxes, frame: Frame) -> list[str]:
    """Return each box as the data of an SVG path, in pixels of the models' square.

    Masks and rotated boxes are drawn as their outlines, keypoints as small diamonds beside the box.
    """
    drawn = []
    for i, (left, top, right, bottom) in enumerate(boxes.corners):
        outline = boxes.outlines[i] if boxes.outlines else np.zeros((0, 2))
        if len(outline) == 0:  # also of a mask without a pixel
            outline = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        path = _polygon(_simplified(_place(outline, frame)))
        for point in _place(boxes.keypoints[i], frame) if boxes.keypoints else ():
            path += _polygon(point + frame.size * KEYPOINT * DIAMOND)
        drawn.append(path)
    return drawn


def _place(points: npt.NDArray[Any], frame: Frame) -> npt.NDArray[np.float64]:
    """Return points (K, 2), given as shares of an image's sides, in pixels of the models' square."""
    placed: npt.NDArray[np.float64] = np.clip(points, 0, 1) * (frame.width, frame.height) + (frame.left, frame.top)
    return placed


def _simplified(outline: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Return an outline without the points that move it by less than TOLERANCE."""
    return np.asarray(cv2.approxPolyDP(outline.astype(np.float32)[:, None], TOLERANCE, closed=True))[:, 0]


def _polygon(points: npt.NDArray[Any]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points.tolist()) + "z"


def layers(group: MapGroup, maps: LevelMaps, before: LevelMaps, level: str, image: int) -> list[Layer]:
    """Return the maps of an image at a level that exist, all on one scale of colors but for the split.

    maps, before: after and before the training.
    """
    moments = {"before": before.get(level, {}), "after": maps[level]}
    found = [
        (name, heading, np.nan_to_num(moments[moment][name][image].astype(np.float32)))
        for name, moment, heading in group.columns(bool(before))
        if name in moments[moment] and name in maps[level]
    ]
    scaled = [values for name, _, values in found if name != "high"]
    low = min((float(values.min()) for values in scaled), default=0.0) if "teacher_attention" in group.maps else 0.0
    high = max((float(np.percentile(values, PERCENTILE)) for values in scaled), default=1.0)
    return [
        Layer(values, 0.0, 1.0, "gray", heading, f"{values.mean():.0%} high")
        if name == "high"
        else Layer(values, low, high, group.colors, heading, _sum_up(group, values))
        for name, heading, values in found
    ]


def _sum_up(group: MapGroup, values: Array) -> str:
    return f"{group.number} {(values.max() if group.number == 'peak' else values.mean()):.3g}"


def gradient(colors: str) -> str:
    """Return a color map as a gradient of CSS, for a legend."""
    stops = _palette(colors)[:: 255 // 5]
    return f"linear-gradient(90deg, {', '.join('#' + stop.tobytes().hex() for stop in stops)})"


def _palette(colors: str) -> npt.NDArray[np.uint8]:
    """Return the 256 colors of one of matplotlib's color maps, (256, 3)."""
    import_matplotlib()
    from matplotlib import colormaps

    palette: npt.NDArray[np.uint8] = (colormaps[colors](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    return palette


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def summarize(group: MapGroup, after: LevelMaps, before: LevelMaps, level: str) -> str:
    """Return one sentence with the means over all images of a map of both models, before and after the training."""
    name = group.maps[0]
    if MAP_KINDS[name].models != "both" or name not in after[level]:
        return ""
    means: Mapping[str, Any] = {
        moment: float(np.mean(maps[level][name]))
        for moment, maps in (("before", before), ("after", after))
        if name in maps.get(level, {})
    }
    return f"Mean at {level}: " + ", ".join(f"{value:.3g} {moment} the training" for moment, value in means.items())


def classes_by_frequency(boxes: Sequence[Boxes]) -> list[int]:
    """Return the classes of boxes, the most frequent first."""
    classes, counts = np.unique(np.concatenate([b.classes for b in boxes]), return_counts=True)
    return [int(label) for _, label in sorted(zip(-counts, classes, strict=True)) if label >= 0]
