"""nnU-Net trainers: masked pre-training and fine-tuning.

Nothing is imported here: nnU-Net looks trainers up by name (see ``registration``), and a look-up must stay cheap.
"""
