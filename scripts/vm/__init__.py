"""What scripts/vm_matrix is made of. `guest` runs inside; everything else, outside."""
