# The firmware of a machine of the tests: 64 KiB, from reset to for ever, the same under TCG and KVM.
#
# Fills memory with pseudo-random words, then sweeps: adds one to a byte each STRIDE bytes from
# START to END, in order, over and over. All of these bytes are 0 before the first sweep. The number
# of sweeps so far is a line on the serial port (COM1, 8 hexadecimal digits): 0 at first, then one
# line each EVERY sweeps. With BATCH it makes so many increments in each period of TIMER (of the
# timer chip's 1193182 a second) at most, and sleeps for the rest of it; 0 for full speed.
#
# The parameters stand at byte 8, as tests/machine/sweep.py writes them. While it sweeps, RBX is the
# number of sweeps so far, and RDI the address of the next increment: tests/bench/qemu.py reads them.
#
# It goes to 64-bit mode, and under KVM on to ring 3: kvm_pvm runs nothing else on the processor, it
# emulates the rest at 300 000 instructions a second. There it can neither sleep nor get interrupts,
# so it looks at the timer until its period is over. Ports can be used, thanks to IOPL 3.
#
# QEMU before 9.0 with TCG forgets to look again at what its TLB says may be written at once, when it
# clears the bits of what is dirty: what is written there later is never sent. So the TLB is emptied
# before the same page is written again (`forget`), and nothing else is written: there are no calls,
# and the frame of the interrupt is the same each time.

        .set    BASE, 0xf0000           # QEMU maps it here, and below 4 GiB
        .set    STACK, 0x7c00
        .set    COM1, 0x3f8
        .set    VECTOR, 32              # of the timer's interrupt
        .set    APIC_LINT0, 0xfee00350

# A change of CR0.WP empties the TLB.
        .macro  forget
        testl   %r8d, %r8d
        jz      1f
        movq    %cr0, %rax
        xorl    $0x10000, %eax
        movq    %rax, %cr0
1:
        .endm

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
        movl    $0x40000000, %eax       # which accelerator this is
        cpuid
        movl    %ebx, %ebp
        lgdtl   %cs:gdt_pointer - BASE
        movl    $0x20, %eax             # PAE
        movl    %eax, %cr4
        movl    $tables, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       # EFER
        rdmsr
        orl     $0x100, %eax            # LME
        wrmsr
        movl    %cr0, %eax
        orl     $0x80010021, %eax       # PG, WP, NE, PE
        movl    %eax, %cr0
        ljmpl   $8, $long

        .code64
long:   movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $STACK, %esp
        cld

        xorl    %r8d, %r8d              # whether this is TCG: in ring 0, with interrupts
        cmpl    $0x54474354, %ebp       # of "TCGTCGTCGTCG"
        jne     leave
        incl    %r8d
        movl    $APIC_LINT0, %eax       # the interrupt controller's interrupts get through,
        movl    $0x700, (%rax)
        movb    $0x11, %al              # they begin at VECTOR,
        outb    %al, $0x20
        movb    $VECTOR, %al
        outb    %al, $0x21
        movb    $4, %al                 # another controller is at input 2,
        outb    %al, $0x21
        movb    $3, %al                 # they end by themselves,
        outb    %al, $0x21
        movb    $0xfe, %al              # and of all of them there is only the timer's
        outb    %al, $0x21
        lidt    idt_pointer
        jmp     user

leave:  pushq   $32 + 3                 # SS, RSP, RFLAGS, CS, RIP
        pushq   $STACK
        pushq   $0x3002
        pushq   $24 + 3
        pushq   $user
        iretq

user:
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
clear:  movb    $0, (%rdi)
        addl    %esi, %edi
        cmpl    END, %edi
        jb      clear

        movb    $0x34, %al              # timer 0: low and high byte, rate generator
        outb    %al, $0x43
        movb    TIMER, %al
        outb    %al, $0x40
        movb    TIMER + 1, %al
        outb    %al, $0x40

        movl    END, %r9d
        movl    BATCH, %ecx
        xorl    %r10d, %r10d            # the timer's count, later
        xorl    %ebx, %ebx              # sweeps so far
        movl    START, %edi             # the next byte
line:   movl    EVERY, %ebp             # sweeps until the next line
        movl    %ebx, %r11d
        movl    $8, %r12d
digit:  roll    $4, %r11d
        movb    %r11b, %al
        andb    $15, %al
        addb    $'0', %al
        cmpb    $'9', %al
        jbe     put
        addb    $'a' - '9' - 1, %al
put:    movb    %al, %ah
        movw    $COM1 + 5, %dx
busy:   inb     %dx, %al
        testb   $0x20, %al
        jz      busy
        movw    $COM1, %dx
        movb    %ah, %al
        outb    %al, %dx
        movb    $'\n', %al
        decl    %r12d
        jg      digit
        jz      put

count:  incb    (%rdi)
        decl    %ecx
        jz      rest
next:   addl    %esi, %edi
        cmpl    %r9d, %edi
        jb      count
        forget
        movl    START, %edi
        incl    %ebx
        decl    %ebp
        jnz     count
        jmp     line

rest:   movl    BATCH, %ecx
        jrcxz   next                    # at full speed, after 2^32 increments
        testl   %r8d, %r8d
        jz      wait
        sti                             # takes effect after the next instruction
        hlt
        cli
        forget
        jmp     next

timer:  iretq

wait:   movl    %r10d, %r11d
        movb    $0, %al                 # latch the timer's count
        outb    %al, $0x43
        inb     $0x40, %al
        movzbl  %al, %r10d
        inb     $0x40, %al
        movzbl  %al, %eax
        shll    $8, %eax
        orl     %eax, %r10d
        cmpl    %r11d, %r10d            # it counts down, so its next period has begun
        ja      next
        jmp     wait

        .balign 8
gdt:    .quad   0                       # what the processor would set in them is set already: this
        .quad   0x00af9b000000ffff      # 8: 64-bit code                            cannot be written
        .quad   0x00cf93000000ffff      # 16: data
        .quad   0x00affb000000ffff      # 24: 64-bit code of ring 3
        .quad   0x00cff3000000ffff      # 32: data of ring 3
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt

        .balign 16
timer_gate:
        .word   timer - BASE, 8, 0x8e00, BASE >> 16
        .quad   0
idt_pointer:
        .word   (VECTOR + 1) * 16 - 1
        .quad   timer_gate - VECTOR * 16 # the gates before it are never used

# The page tables: the first 4 GiB as they are, in pages of 2 MiB.
        .balign 4096
tables: .quad   level3 + 0x27
        .balign 4096
level3: .set    table, level2
        .rept   4
        .quad   table + 0x27
        .set    table, table + 4096
        .endr
        .balign 4096
level2: .set    page, 0
        .rept   2048
        .quad   page + 0xe7
        .set    page, page + 0x200000
        .endr

        .org    0xfff0
        .code16
        ljmp    $BASE >> 4, $boot - BASE
        .org    0x10000
