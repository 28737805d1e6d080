"""The course: assignments made of the package, and graders that are graded. See README.md in this folder.

In a notebook, `from assignments.graft import use; use("handout")` puts your functions in the place of the package's.
"""
