"""Before a tier starts: is what it needs there? Each check says what is wrong and what to mend."""
