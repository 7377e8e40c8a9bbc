"""A trial's answers on labelled pictures: by picture, by class, and as a page of its worst errors."""

import base64
import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lora_vit.analysis.export import as_text, numeric, page
from lora_vit.analysis.stats import wilson
from lora_vit.analysis.tables import confused
from lora_vit.analysis.texts import count, plain
from lora_vit.files import shown
from lora_vit.metrics import Predictions, figures

MOST, SIDE, SMALL = 60, 240, 64  # of a page: wrong pictures; pixels of a side; of one that is enlarged as it is


@dataclass(kw_only=True)
class Evaluated(Predictions):
    """Predictions on one part of a data set, whose pictures and classes are known by name."""

    data: Any  # the ImageData; ``ids`` are those of its samples
    part: str

    def accuracy(self) -> tuple[float, float, float]:
        """With Wilson's 95 % interval, which is for other pictures of the kind."""
        share = float((self.predicted == self.labels).mean())
        return share, *wilson(share, len(self.ids))

    def pictures(self) -> pd.DataFrame:
        """A row for each, by its sample id: first the wrong ones from the surest on, the surest right one last."""
        names, sure = np.array(self.data.class_names, dtype=object), self.top_probability
        files = [shown(self.data.root / self.data.names[i]) if self.data.root else str(i) for i in self.ids]
        columns = {"path": files, "true": names[self.labels], "predicted": names[self.predicted], "probability": sure}
        worst_first = np.argsort(np.where(self.predicted == self.labels, sure, -sure), kind="stable")
        return pd.DataFrame({**columns, "part": self.part}, self.ids).iloc[worst_first]

    def confusion(self) -> pd.DataFrame:
        return confused(self.labels, self.predicted, self.data.class_names)

    def classes(self) -> pd.DataFrame:
        """Each class with pictures, the least recall first: recall with Wilson's 95 % interval, and precision."""
        counts = self.confusion().to_numpy()
        right, images, said = counts.diagonal(), counts.sum(1), counts.sum(0)
        recall, precision = right / images.clip(1), np.where(said > 0, right / said.clip(1), np.nan)
        low, high = wilson(recall, images.clip(1))
        columns = {"images": images, "recall": recall, "low": low, "high": high, "precision": precision}
        frame = pd.DataFrame({"class": self.data.class_names, **columns})[images > 0]
        return frame.sort_values("recall", kind="stable", ignore_index=True)

    def classes_text(self) -> pd.DataFrame:
        interval, precision = ("95 % interval", "low high", plain), ("precision %", "precision", plain)
        own = ("class", "class", str), ("images", "images", count), ("recall %", "recall", plain)
        return as_text(self.classes(), *own, interval, precision)

    def errors_page(self, title: str, command: str) -> str:
        """The wrong pictures, the surest first, with their classes, and what is taken for what."""
        rows, said = self.pictures().reset_index(names="sample"), figures(self.part, self)
        look = {"numeric": numeric, "inline": self._inline, "most": MOST, "title": title, "command": command}
        return page("errors", found=self, rows=rows, classes=self.classes_text(), figures=said, **look)

    def _inline(self, sample: int) -> str:
        """An address that holds a picture, its file's or what is known of it, no larger than the page shows it."""
        data, file = self.data, io.BytesIO()
        whole = replace(data.decoding, size=None)
        pixels = whole(data.root / data.names[sample]) if data.root else data.images[sample]
        image, kind = Image.fromarray(pixels.transpose(1, 2, 0)), "png" if max(pixels.shape) <= SMALL else "jpeg"
        image.thumbnail((SIDE, SIDE))
        image.save(file, kind)
        return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
