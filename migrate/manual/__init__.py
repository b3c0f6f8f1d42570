"""The man pages and the shells' completions, made from the programs' own parsers.

    migrate.cli.*  --argparse-->  parsers  -->  man   share/man/man1/PROG.1
                                           -->  bash  share/bash-completion/completions/PROG
                                           -->  zsh   share/zsh/site-functions/_PROG
                                           -->  fish  share/fish/vendor_completions.d/PROG.fish

setup.py has them written when a wheel is built, and pip puts them under PREFIX/share. By hand:

    python -m migrate.manual DIRECTORY

At build time there are no compiled modules and no other libraries: nothing here may need them.
"""
