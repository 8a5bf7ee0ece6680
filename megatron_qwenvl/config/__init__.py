"""The configuration of a run: from a recipe, a YAML file and overrides to one validated object.

schema        every field with its meaning and unit
recipes       named recipes
recipe_files  YAML files, with the recipes or files that they are based on
load          the front of the room: `load_config`, all problems in one message
validate      contradictions between fields
fields        fields as dotted paths
yaml_format   the YAML dialect
cli           command-line arguments of a run
options       options of the other programs
"""
