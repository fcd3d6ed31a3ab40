"""Curation of descriptions between MiniGPT-4's two stages: generate, refine, filter, review.

Source: MiniGPT-4 (Zhu et al. 2023, arXiv 2304.10592), section 3.2.
"""
