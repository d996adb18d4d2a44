//! Intel AMX in software, so that a machine without it can test the kernels that use it. [`install`] sets a SIGILL
//! handler that decodes the instruction that trapped, does what Intel's manual (SDM volume 2) says, and goes on after.
//!
//! For test processes only. Palette 1; AMX-TILE, AMX-BF16 and AMX-INT8; 64-bit addresses. What would be #GP or #UD ends
//! the process with a message, and an address that is not mapped ends it by SIGSEGV. Any other illegal instruction is
//! left to the default action. Where the process may use the CPU's own AMX nothing traps, and [`emulated`] stays 0.
//!
//! Not promised to match a chip bit for bit: NaN payloads, and sums that round up to the least normal number (kept
//! here; a chip that judges tininess with an unbounded exponent flushes them).

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, Register};

/// 16 rows of 64 bytes.
type Tile = [[u32; 16]; 16];

/// One thread's TILECFG, as in memory, and TILEDATA.
struct State {
    config: [u8; 64],
    tiles: [Tile; 8],
}

/// The architecture's INIT state, in which a thread starts.
const INIT: State = State { config: [0; 64], tiles: [[[0; 16]; 16]; 8] };

thread_local! {
    // Const and without a destructor: the handler's access has nothing to set up, so nothing to allocate.
    static STATE: UnsafeCell<State> = const { UnsafeCell::new(INIT) };
}
static EMULATED: AtomicU64 = AtomicU64::new(0);

/// Instructions emulated so far, on all threads.
pub fn emulated() -> u64 {
    EMULATED.load(Ordering::Relaxed)
}

/// Installs the handler, once per process.
pub fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // The decoder builds its tables and std looks up the CPU's features at their first use. Here, not in the
        // handler: the tables allocate.
        let tilerelease = Decoder::new(64, &[0xc4, 0xe2, 0x78, 0x49, 0xc0], DecoderOptions::NONE).decode();
        assert_eq!(tilerelease.mnemonic(), Mnemonic::Tilerelease);
        has_avx2_fma();
        // SAFETY: zeros are a valid sigaction, with an empty mask, and the handler has the signature for SA_SIGINFO.
        // SA_NODEFER is left out so that an illegal instruction in the handler ends the process.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigill as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, ptr::null_mut())
        };
        assert_eq!(result, 0, "sigaction: {}", std::io::Error::last_os_error());
    });
}

extern "C" fn on_sigill(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO this is the interrupted context, which is the handler's until it returns.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let mut done = 0;
    loop {
        let instruction = decode(registers[libc::REG_RIP as usize] as usize);
        // SAFETY: only this handler uses the thread's state, and SIGILL is blocked on the thread while it runs.
        if !STATE.with(|state| emulate(unsafe { &mut *state.get() }, &instruction, registers)) {
            break;
        }
        registers[libc::REG_RIP as usize] = instruction.next_ip() as i64;
        done += 1; // And on to the next, which may be another: the trap is what costs most.
    }
    EMULATED.fetch_add(done, Ordering::Relaxed);
    if done == 0 {
        // SAFETY: async-signal-safe. The instruction traps again after the return, and the default action follows.
        unsafe { libc::signal(libc::SIGILL, libc::SIG_DFL) };
    }
}

/// Ends the process where the CPU would raise #GP or #UD.
fn fatal(message: &str) -> ! {
    // SAFETY: both calls are async-signal-safe; the pointer and the length are one str's.
    unsafe {
        libc::write(2, message.as_ptr().cast(), message.len());
        libc::abort()
    }
}

fn decode(rip: usize) -> Instruction {
    const LONGEST: usize = 15;
    let decode = |length| {
        // SAFETY: the CPU is at this instruction or comes to it next, so its page is mapped. What follows the page is
        // read only if the instruction goes on there.
        let code = unsafe { std::slice::from_raw_parts(ptr::with_exposed_provenance(rip), length) };
        Decoder::with_ip(64, code, rip as u64, DecoderOptions::NONE).decode()
    };
    let in_page = 4096 - rip % 4096;
    let instruction = decode(in_page.min(LONGEST));
    if instruction.is_invalid() && in_page < LONGEST { decode(LONGEST) } else { instruction }
}

/// The memory operand: the address but for the index register, and the scaled index register (a tile's stride).
fn address(instruction: &Instruction, registers: &[i64; 23]) -> (usize, usize) {
    use libc::{REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    use libc::{REG_RAX, REG_RBP, REG_RBX, REG_RCX, REG_RDI, REG_RDX, REG_RSI, REG_RSP};
    #[rustfmt::skip] // The kernel's index of each register, in the order of the instruction set's numbers.
    const INDEX: [c_int; 16] = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
        REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    let value = |register: Register| match (register as usize).checked_sub(Register::RAX as usize) {
        _ if matches!(register, Register::None | Register::RIP) => 0, // The decoder's displacement includes RIP.
        Some(number @ 0..16) => registers[INDEX[number] as usize] as usize,
        _ => fatal("amx_emulator: only 64-bit addresses are emulated\n"),
    };
    if matches!(instruction.segment_prefix(), Register::FS | Register::GS) {
        fatal("amx_emulator: addresses relative to FS or GS are not emulated\n");
    }
    let base = value(instruction.memory_base()).wrapping_add(instruction.memory_displacement64() as usize);
    (base, value(instruction.memory_index()).wrapping_mul(instruction.memory_index_scale() as usize))
}

/// Does the instruction; false if it is not one of AMX's.
fn emulate(state: &mut State, instruction: &Instruction, registers: &[i64; 23]) -> bool {
    let tile = |operand| instruction.op_register(operand) as usize - Register::TMM0 as usize;
    let mnemonic = instruction.mnemonic();
    match mnemonic {
        Mnemonic::Ldtilecfg | Mnemonic::Sttilecfg => {
            let (base, index) = address(instruction, registers);
            let memory = ptr::with_exposed_provenance_mut::<[u8; 64]>(base.wrapping_add(index));
            // SAFETY: the program reads or writes these 64 bytes, and answers for it as with the instruction itself.
            unsafe {
                if mnemonic == Mnemonic::Ldtilecfg { *state = configured(*memory) } else { *memory = state.config }
            }
            return true; // Unlike the instructions below, these keep the start row.
        }
        Mnemonic::Tilerelease => *state = INIT,
        Mnemonic::Tilezero => {
            shape(state, tile(0));
            state.tiles[tile(0)] = [[0; 16]; 16];
        }
        Mnemonic::Tileloadd | Mnemonic::Tileloaddt1 => {
            let (start, rows, columns) = rows_to_move(state, tile(0));
            let (base, stride) = address(instruction, registers);
            let tile = &mut state.tiles[tile(0)];
            tile[start..].fill([0; 16]);
            for row in start..rows {
                let from = ptr::with_exposed_provenance::<u8>(base.wrapping_add(row.wrapping_mul(stride)));
                // SAFETY: as above; a row has room for its columns, 16 at most.
                unsafe { ptr::copy_nonoverlapping(from, tile[row].as_mut_ptr().cast(), 4 * columns) };
            }
        }
        Mnemonic::Tilestored => {
            let (start, rows, columns) = rows_to_move(state, tile(1));
            let (base, stride) = address(instruction, registers);
            for row in start..rows {
                let to = ptr::with_exposed_provenance_mut::<u8>(base.wrapping_add(row.wrapping_mul(stride)));
                // SAFETY: as above, for a write.
                unsafe { ptr::copy_nonoverlapping(state.tiles[tile(1)][row].as_ptr().cast(), to, 4 * columns) };
            }
        }
        Mnemonic::Tdpbf16ps | Mnemonic::Tdpbssd | Mnemonic::Tdpbsud | Mnemonic::Tdpbusd | Mnemonic::Tdpbuud => {
            let tiles = [tile(0), tile(1), tile(2)];
            let [(m, n), a, (k, b_columns)] = tiles.map(|tile| shape(state, tile));
            if a != (m, k) || b_columns != n {
                fatal("amx_emulator: #UD: the shapes of the three tiles do not go together\n");
            }
            let Ok([c, a, b]) = state.tiles.get_disjoint_mut(tiles) else {
                return false; // One tile twice is #UD. The decoder, too, takes that for no instruction.
            };
            if has_avx2_fma() {
                // SAFETY: the CPU has the features.
                unsafe { multiply_avx2_fma(mnemonic, c, a, b, [m, k, n]) };
            } else {
                multiply(mnemonic, c, a, b, [m, k, n]);
            }
        }
        _ => return false,
    }
    state.config[1] = 0; // The start row.
    true
}

/// LDTILECFG.
fn configured(config: [u8; 64]) -> State {
    if config[0] == 0 {
        return INIT;
    }
    let mut reserved = config[2..16].iter().chain(&config[32..48]).chain(&config[56..]);
    if config[0] != 1 || reserved.any(|&byte| byte != 0) {
        fatal("amx_emulator: #GP: LDTILECFG with a palette other than 0 and 1 or a reserved byte that is not 0\n");
    }
    let state = State { config, ..INIT };
    for tile in 0..8 {
        let (rows, colsb) = rows_colsb(&state, tile);
        if rows > 16 || colsb > 64 || (rows == 0) != (colsb == 0) {
            fatal("amx_emulator: #GP: LDTILECFG with bad rows or colsb\n");
        }
    }
    state
}

fn rows_colsb(state: &State, tile: usize) -> (usize, usize) {
    let colsb = [state.config[16 + 2 * tile], state.config[17 + 2 * tile]];
    (state.config[48 + tile].into(), u16::from_le_bytes(colsb).into())
}

/// The rows and the 4-byte columns of a tile that is about to be used.
fn shape(state: &State, tile: usize) -> (usize, usize) {
    let (rows, colsb) = rows_colsb(state, tile);
    if rows == 0 || colsb % 4 != 0 {
        fatal("amx_emulator: #UD: use of a tile not configured, or whose colsb is not a multiple of 4\n");
    }
    (rows, colsb / 4)
}

/// The row that a load or a store starts from, and the tile's shape.
fn rows_to_move(state: &State, tile: usize) -> (usize, usize, usize) {
    let (start, (rows, columns)) = (state.config[1].into(), shape(state, tile));
    if start >= rows {
        fatal("amx_emulator: #UD: the start row is not a row of the tile\n");
    }
    (start, rows, columns)
}

fn has_avx2_fma() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// [`multiply`], compiled so that its loops use these features: `mul_add` is a call of libm's without.
#[target_feature(enable = "avx2,fma")]
fn multiply_avx2_fma(mnemonic: Mnemonic, c: &mut Tile, a: &Tile, b: &Tile, shape: [usize; 3]) {
    multiply(mnemonic, c, a, b, shape);
}

/// C += A B for a C of m by n, an A of m by k and a B of k by n, in dwords. The rest of C becomes zero.
#[inline(always)]
fn multiply(mnemonic: Mnemonic, c: &mut Tile, a: &Tile, b: &Tile, [m, k, n]: [usize; 3]) {
    match mnemonic {
        Mnemonic::Tdpbf16ps => multiply_bf16(c, a, b, m, k),
        Mnemonic::Tdpbssd => multiply_int8::<true, true>(c, a, b, m, k),
        Mnemonic::Tdpbsud => multiply_int8::<true, false>(c, a, b, m, k),
        Mnemonic::Tdpbusd => multiply_int8::<false, true>(c, a, b, m, k),
        _ => multiply_int8::<false, false>(c, a, b, m, k),
    }
    // All 16 columns are computed, since loops of a constant length vectorise.
    c[..m].iter_mut().for_each(|row| row[n..].fill(0));
    c[m..].fill([0; 16]);
}

/// Each product is accumulated by one fused multiply-add; the even and the odd elements of the pairs have sums of their
/// own from zero, and C is added to the total of the two at the end. (Intel's intrinsics guide has it otherwise.)
#[inline(always)]
fn multiply_bf16(c: &mut Tile, a: &Tile, b: &Tile, m: usize, k: usize) {
    let even = |pair: u32| flush(f32::from_bits(pair << 16));
    let odd = |pair: u32| flush(f32::from_bits(pair & 0xffff_0000));
    let (b_even, b_odd) = (b.map(|row| row.map(even)), b.map(|row| row.map(odd)));
    for (c, a) in c.iter_mut().zip(a).take(m) {
        let (mut sum_even, mut sum_odd) = ([0.0; 16], [0.0; 16]);
        for k in 0..k {
            let (a_even, a_odd) = (even(a[k]), odd(a[k]));
            for n in 0..16 {
                sum_even[n] = flush(a_even.mul_add(b_even[k][n], sum_even[n]));
                sum_odd[n] = flush(a_odd.mul_add(b_odd[k][n], sum_odd[n]));
            }
        }
        for n in 0..16 {
            c[n] = flush(flush(f32::from_bits(c[n])) + flush(sum_even[n] + sum_odd[n])).to_bits();
        }
    }
}

/// Zero, of the same sign, for a subnormal number: inputs are read so and results are written so.
#[inline(always)]
fn flush(x: f32) -> f32 {
    let keep = if x.to_bits() & 0x7f80_0000 == 0 { 0x8000_0000 } else { 0xffff_ffff };
    f32::from_bits(x.to_bits() & keep)
}

/// Sums of four products of bytes, which wrap.
#[inline(always)]
fn multiply_int8<const A_SIGNED: bool, const B_SIGNED: bool>(c: &mut Tile, a: &Tile, b: &Tile, m: usize, k: usize) {
    let byte = |quad: u32, i: u32, signed: bool| {
        let top = quad << (24 - 8 * i);
        if signed { top as i32 >> 24 } else { (top >> 24) as i32 }
    };
    for (c, a) in c.iter_mut().zip(a).take(m) {
        for k in 0..k {
            for n in 0..16 {
                for i in 0..4 {
                    c[n] = c[n].wrapping_add((byte(a[k], i, A_SIGNED) * byte(b[k][n], i, B_SIGNED)) as u32);
                }
            }
        }
    }
}
