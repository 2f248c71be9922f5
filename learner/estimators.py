"""The coefficient A_t of grad log pi_theta(y_t): a cost, without gradient. Shapes: B trajectories, T tokens, padded."""

from torch import Tensor


def immediate(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """A_t = r_t: discount 0."""
    return log_ratio_BT * mask_BT


def to_go(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """A_t = sum over t' >= t of r_t'."""
    masked = log_ratio_BT * mask_BT
    return masked.flip(-1).cumsum(-1).flip(-1)


ESTIMATORS = {"immediate": immediate, "to_go": to_go}
