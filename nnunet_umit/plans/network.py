"""The segmentation network of a plan: all that prediction needs to know of a trainer."""

from __future__ import annotations

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_umit.config import get_umit_config


class PlannedSegmenter:
    """What ``UMITTrainer`` is to nnU-Net's predictor. In a module of its own, so that prediction does not import
    training (2 s)."""

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network of the plan, with the drop path of its ``finetune`` section (which prediction switches off)."""
        finetune = get_umit_config(configuration_manager).finetune
        return get_network_from_plans(
            configuration_manager.network_arch_class_name,
            {**configuration_manager.network_arch_init_kwargs, "drop_path": finetune.drop_path},
            configuration_manager.network_arch_init_kwargs_req_import,
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )
