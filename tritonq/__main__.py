from tritonq.cli import main

main()
