"""What is shown of a migration, while it runs and afterwards: each part observes, none decides.

    Source --(event, statistics)--> Views --> history       what each round did
                                        |---> progress      lines, where there is no terminal
                                        |---> live          a picture, where there is one
                                        |---> events        a JSON object for each event
                                        |---> metrics       Prometheus text, by HTTP or in a file
                                        +---> report        one HTML page

`options` reads the command line and makes the Views.
"""
