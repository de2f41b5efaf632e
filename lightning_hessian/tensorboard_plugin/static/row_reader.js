// Exact rows of one Hessian: from the matrix that is drawn where it is whole, else asked for, one request at a time.

export class RowReader {
  #waiting = null; // the row asked for last, while another is on its way
  #busy = false;

  // `where` is [run, tag, step, sample, column].
  constructor(source, where, { values, size, block }) {
    Object.assign(this, { source, where, values, size, whole: block === 1 });
  }

  // The row [D], or null where another row was asked for before this one was fetched.
  async read(index) {
    if (this.whole) return this.values.subarray(index * this.size, (index + 1) * this.size);
    if (this.#busy) {
      this.#waiting?.(null);
      if (!(await new Promise((resolve) => (this.#waiting = resolve)))) return null;
    }
    this.#busy = true;
    try {
      const { arrays } = await this.source.row(...this.where, index);
      return arrays.row.data;
    } finally {
      this.#busy = false;
      const next = this.#waiting;
      this.#waiting = null;
      next?.(true);
    }
  }
}
