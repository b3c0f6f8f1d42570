"""The man pages and shell completions, made from the programs' own parsers.

    migrate.cli.*  --argparse-->  parsers  -->  man   share/man/man1/PROG.1
                                           -->  bash  share/bash-completion/completions/PROG
                                           -->  zsh   share/zsh/site-functions/_PROG
                                           -->  fish  share/fish/vendor_completions.d/PROG.fish

setup.py writes them when a wheel is built, and pip installs them under PREFIX/share. By hand:

    python -m migrate.manual DIRECTORY

At build time there are no compiled modules and no other libraries: nothing here may need them.

Libraries for this were tried against the tests, in the real shells. shtab 1.13 completes no value
after `--option=`, in bash no value that contains `=` or `:` (readline splits words there, and our
values are full of them: file:PATH, unix:PATH, xbzrle=on), no subcommand beside positional arguments
(`resolve`), and it has no fish. argparse-manpage 4.8 writes exit codes and examples as one block
under COMMENTS, leaves --help out, and mandoc and groff complain of its lines.
"""
