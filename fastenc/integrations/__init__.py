"""What other packages have to be told of fastenc, one file for each; none is imported until it is asked for."""
