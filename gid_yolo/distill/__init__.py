"""Section 3 of the paper, one file a subsection.

A detector is known here only by its raw predictions and three functions.
"""

from gid_yolo.distill.feature import feature_loss
from gid_yolo.distill.gid import GIDLoss
from gid_yolo.distill.gism import select_general_instances
from gid_yolo.distill.relation import relation_loss
from gid_yolo.distill.response import response_loss

__all__ = ["GIDLoss", "feature_loss", "relation_loss", "response_loss", "select_general_instances"]
