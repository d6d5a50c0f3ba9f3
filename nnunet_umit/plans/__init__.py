"""Planning: from nnU-Net's dataset fingerprint to a plans file, and from raw images to checked, preprocessed ones.

Kept empty on purpose: `nnUNetv2_preprocess` imports `nnunet_umit.plans.preprocessor` in every spawned worker, and none
of them should pay for the memory model or the planner.
"""
