"""The ground of the programs: tasks, threads, helper processes, other processes, machine memory."""
