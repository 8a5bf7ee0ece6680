"""Accepted records: the content of a sample's `json` or `txt` file, checked and typed.

tasks         the record of each task, and `decode_record`, the front of the room
dialogues     which dialogues are accepted, and how they are read
markup        grounding markup and images in the text of a dialogue
attempts      text that only looks like markup
fields        text and numbers wherever they occur
coordinates   boxes and quadrilaterals
"""
