"""What all tests share; its presence also lets them import the helpers beside it."""
