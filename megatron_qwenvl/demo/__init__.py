"""A small world of drawn images on which a tiny model learns to see, and the examination of that model.

scenes       drawn images: coloured shapes and digits
records      questions, captions and dialogues about them
dataset      both as WebDataset shards
training     draws the data set and trains the three stages
answers      a model's answers to questions
examination  scores of these answers
questioning  loads the trained model, examines it, writes the report page
"""
