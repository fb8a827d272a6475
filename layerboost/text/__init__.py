"""Reads, mixes, formats, packs, batches and samples the text that models are evaluated and healed on."""
