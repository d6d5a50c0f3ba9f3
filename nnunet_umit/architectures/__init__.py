"""Networks: torch only, never nnU-Net's trainers or planners. Import from the modules; nothing is loaded here."""
