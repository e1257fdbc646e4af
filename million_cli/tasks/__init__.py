"""The measurements, one file or folder a task.

A task is a module (see `base`) with a line in `registry.TASKS`, or an entry point `million.tasks` of another
package.
"""
