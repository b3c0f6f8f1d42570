"""What is shown of a migration, while it runs and afterwards. Views observe; they decide nothing.

    Source --(event, statistics)--> Views --> history       what each round did
                                        |---> progress      lines, without a terminal
                                        |---> live          a picture, on a terminal
                                        |---> events        a JSON object per event
                                        |---> metrics       Prometheus text, by HTTP or in a file
                                        +---> report        one HTML page

`options` reads the command line and makes the Views.
"""
