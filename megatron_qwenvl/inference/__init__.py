"""Generation with a whole model in one process.

generate      greedy decoding with images
loaded_model  a model that is loaded, used and closed
prompt        a prompt as the model takes it
"""
