# The load that QEMU's guest runs: 512 bytes, from boot to for ever.
#
# Fills its memory from 1 MiB to FILL_END with pseudo-random words (no page is zero), then adds one
# to a byte each STRIDE bytes from 1 MiB to HOT_END, in order, BATCH of them a millisecond; BATCH
# unpaced ones after another where PACED is 0. What the host may read:
#
#     0x600   1 filling, 2 counting
#     0x604   increments so far, modulo 2^32
#
# Assembled with --defsym for FILL_END, HOT_END, STRIDE, BATCH, PACED.

        .set    STATUS, 0x600
        .set    COUNT, 0x604
        .set    PERIOD, 0x608           # clock ticks (TSC) a millisecond
        .set    BASE, 0x100000
        .set    DIVISOR, 1193           # the timer chip counts 1193182 a second
        .set    SAMPLES, 64             # milliseconds that PERIOD is measured over, 2^6

        .code16
        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        lgdtl   gdt_pointer
        movl    %cr0, %eax
        orb     $1, %al                 # protected mode
        movl    %eax, %cr0
        ljmpl   $8, $flat

        .code32
flat:   movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7c00, %esp
        cld

        movl    $1, STATUS
        movl    $0, COUNT
        movl    $BASE, %edi
        movl    $0x9e3779b9, %eax
fill:   movl    %eax, %edx              # xorshift32: never zero
        shll    $13, %edx
        xorl    %edx, %eax
        movl    %eax, %edx
        shrl    $17, %edx
        xorl    %edx, %eax
        movl    %eax, %edx
        shll    $5, %edx
        xorl    %edx, %eax
        stosl
        cmpl    $FILL_END, %edi
        jb      fill

        movb    $0x34, %al              # timer 0: low and high byte, rate generator
        outb    %al, $0x43
        movb    $(DIVISOR & 0xff), %al
        outb    %al, $0x40
        movb    $(DIVISOR >> 8), %al
        outb    %al, $0x40
        movb    $0xfe, %al              # of all interrupts only the timer's
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1
        lidt    idt_pointer
        sti

        hlt                             # from one tick on ...
        rdtsc
        movl    %eax, %esi
        movl    $SAMPLES, %ecx
tick:   hlt
        loop    tick
        rdtsc                           # ... to the one 64 ticks later
        movl    %eax, %ebx
        subl    %esi, %ebx
        shrl    $6, %ebx
        movl    %ebx, PERIOD
        movl    %eax, %esi              # when the next batch is due: ebp:esi
        movl    %edx, %ebp

        movl    $2, STATUS
        movl    $BASE, %edi
batch:  movl    $BATCH, %ecx
count:  incb    (%edi)
        addl    $STRIDE, %edi
        cmpl    $HOT_END, %edi
        jb      inside
        movl    $BASE, %edi
inside: loop    count
        addl    $BATCH, COUNT
        .if     PACED
        addl    PERIOD, %esi
        adcl    $0, %ebp
wait:   rdtsc
        subl    %esi, %eax
        sbbl    %ebp, %edx
        jns     batch                   # due, or late: make up for it
        hlt                             # sleeps until the next tick
        jmp     wait
        .endif
        jmp     batch

timer:  pushl   %eax
        movb    $0x20, %al              # end of interrupt
        outb    %al, $0x20
        popl    %eax
        iretl

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff      # 8: code, 32 bits, all 4 GiB
        .quad   0x00cf92000000ffff      # 16: data
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

        .balign 8
timer_gate:                             # the BIOS has put the timer at vector 8
        .word   timer, 8, 0x8e00, 0     # the code is below 64 KiB: the upper half is 0
idt_pointer:
        .word   9 * 8 - 1
        .long   timer_gate - 8 * 8      # the gates before it are never used

        .org    510
        .byte   0x55, 0xaa
