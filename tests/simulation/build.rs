//! Exports the simulated sources of randomness, so that what looks them up at run time (ids made
//! by `uuid`) finds them too.

fn main() {
    for symbol in ["getrandom", "getentropy"] {
        println!("cargo:rustc-link-arg-bins=-Wl,--export-dynamic-symbol={symbol}");
    }
}
