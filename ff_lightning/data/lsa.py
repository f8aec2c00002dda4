"""Texts as vectors (F,): latent semantic analysis.

Shapes: N texts, F numbers of a text.
"""

import json

import numpy as np
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ff_lightning.data.memory import Samples


class LSAEncoder:
    """TF-IDF of the words of a text, reduced to its F strongest directions and standardised: float32 (F,).

    It learns words, directions and statistics from the texts it is fitted to.

    Args:
        vocabulary: Most words.
        length: F.
    """

    statistics = None

    def __init__(self, vocabulary: int, length: int) -> None:
        self.input_shape = (length,)
        self.words = TfidfVectorizer(max_features=vocabulary, sublinear_tf=True, dtype=np.float32)
        self.directions = TruncatedSVD(length, random_state=0)
        self.scaler = StandardScaler()

    def fit(self, samples: Samples) -> None:
        """Learn words, directions and statistics.

        Raises:
            ValueError: If there are fewer words or texts than directions.
        """
        counts = self.words.fit_transform(samples.inputs)
        if min(counts.shape) < self.input_shape[0]:
            raise ValueError(
                f"length={self.input_shape[0]}: the {counts.shape[0]} texts for training have {counts.shape[1]} words, "
                "level='lsa' makes no more numbers than there are of either"
            )
        self.scaler.fit(self.directions.fit_transform(counts))

    def transform(self, samples: Samples) -> Tensor:
        """The vectors of all texts, float32 (N, F)."""
        vectors = self.scaler.transform(self.directions.transform(self.words.transform(samples.inputs)))
        return torch.from_numpy(vectors.astype(np.float32))

    def to_str(self) -> str:
        """The words and their weights, to tell one vocabulary from another."""
        return json.dumps([self.words.get_feature_names_out().tolist(), self.words.idf_.round(4).tolist()])
