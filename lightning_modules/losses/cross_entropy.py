"""Cross-entropy on a batch that may hold outliers, or nothing."""

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the ID rows of a batch, on several processes over the rows of each.

    Args:
        logits: (B, K).
        labels: (B,), -1 = outlier: such rows do not count.
        label_smoothing: share of the target that is spread over all classes.

    Returns:
        A scalar; 0 with a live graph where the batch (this process's share of it) holds no ID row.
    """
    known = labels >= 0
    if not known.any():
        return logits.sum() * 0
    return functional.cross_entropy(logits[known], labels[known], label_smoothing=label_smoothing)
