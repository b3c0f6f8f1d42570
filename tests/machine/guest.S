# The guest of a machine of the tests: 512 bytes, from boot to for ever.
#
# Fills memory with pseudo-random words, then sweeps: adds one to a byte each STRIDE bytes from
# START to END, in order, over and over. All of these bytes are 0 before the first sweep. The number
# of sweeps so far is a line on the serial port (COM1, 8 hexadecimal digits): 0 at first, then one
# line each EVERY sweeps. With BATCH it makes so many increments in each period of TIMER (of the
# timer chip's 1193182 a second) at most, and sleeps for the rest of it; 0 for full speed.
#
# The parameters stand at byte 8, as tests/machine/sweep.py writes them.

        .set    COM1, 0x3f8

        .code16
        .globl  _start
_start: jmp     boot

        .org    8
START:  .long   0
END:    .long   0
STRIDE: .long   0
EVERY:  .long   0
FILL_START: .long 0                     # in whole words; nothing where it is FILL_END
FILL_END: .long 0
BATCH:  .long   0
TIMER:  .long   0

boot:   cli
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

        movw    $COM1 + 1, %dx          # no interrupts of it,
        xorl    %eax, %eax
        outb    %al, %dx
        movw    $COM1 + 3, %dx          # 8 bits, no parity
        movb    $3, %al
        outb    %al, %dx

        movl    FILL_START, %edi
        movl    $0x9e3779b9, %eax
        jmp     filled
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
filled: cmpl    FILL_END, %edi
        jb      fill

        movl    STRIDE, %esi
        movl    START, %edi
clear:  movb    $0, (%edi)
        addl    %esi, %edi
        cmpl    END, %edi
        jb      clear

        movb    $0x34, %al              # timer 0: low and high byte, rate generator
        outb    %al, $0x43
        movb    TIMER, %al
        outb    %al, $0x40
        movb    TIMER + 1, %al
        outb    %al, $0x40
        movb    $0xfe, %al              # of all interrupts only the timer's
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1
        lidt    idt_pointer

        movl    BATCH, %ecx
        xorl    %ebx, %ebx              # sweeps so far
line:   movl    EVERY, %ebp             # sweeps until the next line
        call    print
sweep:  movl    START, %edi
count:  incb    (%edi)
        decl    %ecx
        jz      rest
next:   addl    %esi, %edi
        cmpl    END, %edi
        jb      count
        call    forget
        incl    %ebx
        decl    %ebp
        jnz     sweep
        jmp     line

rest:   movl    BATCH, %ecx
        jecxz   next                    # at full speed, after 2^32 increments
        sti                             # takes effect after the next instruction
        hlt
        cli
        call    forget
        jmp     next

# QEMU before 9.0 with TCG forgets to look again at what its TLB says may be written at once, when it
# clears the bits of what is dirty: what is written there later is never sent. So the TLB is emptied
# before the same page is written again, which a change of CR0.WP does.
forget: movl    %cr0, %eax
        xorl    $0x10000, %eax
        movl    %eax, %cr0
        ret

print:  pushl   %ecx
        movl    $8, %ecx
digit:  roll    $4, %ebx
        movb    %bl, %al
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     decimal
        addb    $'a' - '9' - 1, %al
decimal: call   put
        loop    digit
        popl    %ecx
        movb    $'\n', %al
put:    movb    %al, %ah
        movw    $COM1 + 5, %dx
busy:   inb     %dx, %al
        testb   $0x20, %al
        jz      busy
        movw    $COM1, %dx
        movb    %ah, %al
        outb    %al, %dx
        ret

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
