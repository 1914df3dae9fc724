package backend

import (
	"bytes"
	"debug/elf"
	"debug/macho"
	"debug/pe"
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// Executable is what the headers of a program or library say.
type Executable struct {
	Format     string    `json:"format"` // ELF, PE or Mach-O
	Machine    string    `json:"machine"`
	Type       string    `json:"type"`
	EntryPoint string    `json:"entryPoint,omitempty"`
	Sections   []Section `json:"sections"`
	Libraries  []string  `json:"libraries"` // that it wants to be loaded with it

	mediaType  string
	unmeasured uint64 // how many bytes sections may still claim: in an honest file they do not overlap
}

// Section is a part of an executable.
type Section struct {
	Name    string  `json:"name"`
	Size    uint64  `json:"size"`
	Entropy float64 `json:"entropy"` // of what the file holds of it
}

// The bounds of what is read from headers, which may claim anything.
const (
	maxSections  = 100
	maxLibraries = 200
	maxCommands  = 1000
	maxMachines  = 20
	maxName      = 200
)

// readExecutable reads the headers of a file in one of the formats that Go knows; nil is for all others, and for those
// that only look like one.
//
// The debug packages lend their types and constants, but do not read the file: they are not made for a hostile one. A
// megabyte without a zero can have them copy a name of a megabyte for each of a thousand sections.
func readExecutable(file []byte) *Executable {
	f := image(file)
	switch {
	case bytes.HasPrefix(file, []byte(elf.ELFMAG)):
		return readELF(f)
	case bytes.HasPrefix(file, []byte("MZ")):
		return readPE(f)
	case bytes.HasPrefix(file, []byte{0xca, 0xfe, 0xba, 0xbe}):
		return readFatMachO(f)
	default:
		return readMachO(f)
	}
}

// image is a file that is read at offsets which it gives itself: what it does not hold is not there.
type image []byte

// from is what the file holds at an offset and behind it.
func (f image) from(offset uint64) image {
	return f[min(offset, uint64(len(f))):]
}

// part is what the file holds of a part of it.
func (f image) part(offset, size uint64) image {
	rest := f.from(offset)
	return rest[:min(size, uint64(len(rest)))]
}

// decode reads a structure of fixed size, and tells whether the file holds all of it.
func (f image) decode(offset uint64, order binary.ByteOrder, value any) bool {
	_, err := binary.Decode(f.from(offset), order, value)
	return err == nil
}

// name reads a string that ends with a zero.
func (f image) name(offset uint64) string {
	return cString(f.part(offset, maxName))
}

func cString(text []byte) string {
	text, _, _ = bytes.Cut(text, []byte{0})
	return string(text)
}

// addSection measures what the file holds of a section.
func (e *Executable) addSection(name string, size uint64, content image) {
	content = content.part(0, e.unmeasured)
	e.unmeasured -= uint64(len(content))
	e.Sections = append(e.Sections, Section{Name: name, Size: size, Entropy: entropy(content)})
}

func (e *Executable) addLibrary(name string) {
	if name != "" && len(e.Libraries) < maxLibraries {
		e.Libraries = append(e.Libraries, name)
	}
}

func readELF(f image) *Executable {
	var order binary.ByteOrder = binary.LittleEndian
	if bytes.HasPrefix(f.from(elf.EI_DATA), []byte{byte(elf.ELFDATA2MSB)}) {
		order = binary.BigEndian
	}
	wide := bytes.HasPrefix(f.from(elf.EI_CLASS), []byte{byte(elf.ELFCLASS64)})
	header, ok := elfHeader(f, order, wide)
	if !ok {
		return nil
	}
	exe := &Executable{
		Format: "ELF", Machine: elf.Machine(header.Machine).String(), Type: elf.Type(header.Type).String(),
		EntryPoint: fmt.Sprintf("%#x", header.Entry), mediaType: "application/x-elf", unmeasured: uint64(len(f)),
	}
	section := func(i uint32) (s elf.Section64) {
		if i < uint32(header.Shnum) {
			s = elfSection(f, order, wide, header.Shoff+uint64(i)*uint64(header.Shentsize))
		}
		return s
	}
	names := section(uint32(header.Shstrndx))
	for i := range min(uint32(header.Shnum), maxSections) {
		s := section(i)
		if kind := elf.SectionType(s.Type); kind == elf.SHT_NULL || kind == elf.SHT_NOBITS {
			continue
		}
		content := f.part(s.Off, s.Size)
		exe.addSection(f.part(names.Off, names.Size).name(uint64(s.Name)), s.Size, content)
		if elf.SectionType(s.Type) == elf.SHT_DYNAMIC {
			texts := section(s.Link)
			exe.addELFLibraries(content, order, wide, f.part(texts.Off, texts.Size))
		}
	}
	return exe
}

// elfHeader reads the header of a file, in the form that a 64-bit one has.
func elfHeader(f image, order binary.ByteOrder, wide bool) (h elf.Header64, ok bool) {
	if wide {
		return h, f.decode(0, order, &h)
	}
	var h32 elf.Header32
	ok = f.decode(0, order, &h32)
	return elf.Header64{
		Type: h32.Type, Machine: h32.Machine, Entry: uint64(h32.Entry),
		Shoff: uint64(h32.Shoff), Shentsize: h32.Shentsize, Shnum: h32.Shnum, Shstrndx: h32.Shstrndx,
	}, ok
}

// elfSection reads the header of a section likewise. One that is not there is a section of type SHT_NULL.
func elfSection(f image, order binary.ByteOrder, wide bool, offset uint64) (s elf.Section64) {
	if wide {
		f.decode(offset, order, &s)
		return s
	}
	var s32 elf.Section32
	f.decode(offset, order, &s32)
	return elf.Section64{Name: s32.Name, Type: s32.Type, Off: uint64(s32.Off), Size: uint64(s32.Size), Link: s32.Link}
}

func (e *Executable) addELFLibraries(dynamic image, order binary.ByteOrder, wide bool, texts image) {
	for len(dynamic) > 0 && len(e.Libraries) < maxLibraries {
		var d elf.Dyn64
		if wide {
			dynamic.decode(0, order, &d)
		} else {
			var d32 elf.Dyn32
			dynamic.decode(0, order, &d32)
			d = elf.Dyn64{Tag: int64(d32.Tag), Val: uint64(d32.Val)}
		}
		switch elf.DynTag(d.Tag) {
		case elf.DT_NULL: // the last one, or less than one
			return
		case elf.DT_NEEDED:
			e.addLibrary(texts.name(d.Val))
		}
		if wide {
			dynamic = dynamic.from(16)
		} else {
			dynamic = dynamic.from(8)
		}
	}
}

const (
	peHeaderSize  = 20
	peSectionSize = 40
	peImportSize  = 20
)

var peMachines = map[uint16]string{
	pe.IMAGE_FILE_MACHINE_I386:  "i386",
	pe.IMAGE_FILE_MACHINE_AMD64: "amd64",
	pe.IMAGE_FILE_MACHINE_ARMNT: "arm",
	pe.IMAGE_FILE_MACHINE_ARM64: "arm64",
}

func readPE(f image) *Executable {
	var start uint32
	if !f.decode(60, binary.LittleEndian, &start) || !bytes.HasPrefix(f.from(uint64(start)), []byte("PE\x00\x00")) {
		return nil
	}
	var header pe.FileHeader
	offset := uint64(start) + 4
	if !f.decode(offset, binary.LittleEndian, &header) {
		return nil
	}
	offset += peHeaderSize
	exe := &Executable{
		Format: "PE", Machine: peMachines[header.Machine], Type: "executable",
		mediaType: "application/vnd.microsoft.portable-executable", unmeasured: uint64(len(f)),
	}
	if exe.Machine == "" {
		exe.Machine = fmt.Sprintf("%#x", header.Machine)
	}
	if header.Characteristics&pe.IMAGE_FILE_DLL != 0 {
		exe.Type = "library"
	}
	entry, imports := peOptionalHeader(f, offset)
	exe.EntryPoint = fmt.Sprintf("%#x", entry)

	offset += uint64(header.SizeOfOptionalHeader)
	sections := make([]pe.SectionHeader32, min(header.NumberOfSections, maxSections))
	for i := range sections {
		s := &sections[i]
		if !f.decode(offset, binary.LittleEndian, s) {
			break
		}
		offset += peSectionSize
		content := f.part(uint64(s.PointerToRawData), uint64(s.SizeOfRawData))
		exe.addSection(peSectionName(f, header, s), uint64(s.SizeOfRawData), content)
	}
	exe.addPELibraries(f, sections, imports)
	return exe
}

// peSectionName is the name in the header of a section, or, if that is too short, where in the table of strings it is:
// behind the symbols.
func peSectionName(f image, header pe.FileHeader, section *pe.SectionHeader32) string {
	name := cString(section.Name[:])
	text, long := strings.CutPrefix(name, "/")
	offset, err := strconv.ParseUint(text, 10, 32)
	if !long || err != nil || header.PointerToSymbolTable == 0 {
		return name
	}
	return f.name(uint64(header.PointerToSymbolTable) + pe.COFFSymbolSize*uint64(header.NumberOfSymbols) + offset)
}

// peOptionalHeader reads where a program starts, and where in memory its imports are listed.
func peOptionalHeader(f image, offset uint64) (entry, imports uint32) {
	const wideMagic = 0x20b
	var wide pe.OptionalHeader64
	if f.decode(offset, binary.LittleEndian, &wide) && wide.Magic == wideMagic {
		return wide.AddressOfEntryPoint, wide.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_IMPORT].VirtualAddress
	}
	var narrow pe.OptionalHeader32
	f.decode(offset, binary.LittleEndian, &narrow)
	return narrow.AddressOfEntryPoint, narrow.DataDirectory[pe.IMAGE_DIRECTORY_ENTRY_IMPORT].VirtualAddress
}

func (e *Executable) addPELibraries(f image, sections []pe.SectionHeader32, imports uint32) {
	list := peMemory(f, sections, imports)
	for len(e.Libraries) < maxLibraries {
		var directory struct{ OriginalFirstThunk, TimeDateStamp, ForwarderChain, Name, FirstThunk uint32 }
		if !list.decode(0, binary.LittleEndian, &directory) || directory.Name == 0 {
			return
		}
		name := peMemory(f, sections, directory.Name).name(0)
		if name == "" {
			return
		}
		e.addLibrary(name)
		list = list.from(peImportSize)
	}
}

// peMemory is what is loaded to an address in memory, up to the end of its section.
func peMemory(f image, sections []pe.SectionHeader32, address uint32) image {
	for _, s := range sections {
		if address >= s.VirtualAddress && address-s.VirtualAddress < s.SizeOfRawData {
			return f.part(uint64(s.PointerToRawData), uint64(s.SizeOfRawData)).from(uint64(address - s.VirtualAddress))
		}
	}
	return nil
}

// What debug/macho leaves unnamed.
const (
	machoMain      = 0x80000028 // LC_MAIN
	machoWeakDylib = 0x80000018 // LC_LOAD_WEAK_DYLIB
	machoReexport  = 0x8000001f // LC_REEXPORT_DYLIB

	machoPartSize                          = 20
	machoHeaderSize32, machoHeaderSize64   = 28, 32
	machoSegmentSize32, machoSegmentSize64 = 56, 72
	machoSectionSize32, machoSectionSize64 = 68, 80
)

func readMachO(f image) *Executable {
	var order binary.ByteOrder = binary.LittleEndian
	var header macho.FileHeader
	if f.decode(0, order, &header); header.Magic != macho.Magic32 && header.Magic != macho.Magic64 {
		order = binary.BigEndian
	}
	if !f.decode(0, order, &header) || header.Magic != macho.Magic32 && header.Magic != macho.Magic64 {
		return nil
	}
	exe := &Executable{
		Format: "Mach-O", Machine: header.Cpu.String(), Type: header.Type.String(),
		mediaType: "application/x-mach-binary", unmeasured: uint64(len(f)),
	}
	commands := f.from(machoHeaderSize32)
	if header.Magic == macho.Magic64 {
		commands = f.from(machoHeaderSize64)
	}
	for range min(header.Ncmd, maxCommands) {
		var command struct {
			Cmd macho.LoadCmd
			Len uint32
		}
		if !commands.decode(0, order, &command) || command.Len < 8 {
			break
		}
		exe.addMachOCommand(f, order, command.Cmd, commands.part(0, uint64(command.Len)))
		commands = commands.from(uint64(command.Len))
	}
	return exe
}

func (e *Executable) addMachOCommand(f image, order binary.ByteOrder, kind macho.LoadCmd, command image) {
	switch kind {
	case macho.LoadCmdSegment:
		var segment macho.Segment32
		command.decode(0, order, &segment)
		sections := command.from(machoSegmentSize32)
		for range segment.Nsect {
			var s macho.Section32
			if len(e.Sections) == maxSections || !sections.decode(0, order, &s) {
				return
			}
			sections = sections.from(machoSectionSize32)
			e.addMachOSection(f, s.Name, s.Offset, uint64(s.Size))
		}
	case macho.LoadCmdSegment64:
		var segment macho.Segment64
		command.decode(0, order, &segment)
		sections := command.from(machoSegmentSize64)
		for range segment.Nsect {
			var s macho.Section64
			if len(e.Sections) == maxSections || !sections.decode(0, order, &s) {
				return
			}
			sections = sections.from(machoSectionSize64)
			e.addMachOSection(f, s.Name, s.Offset, s.Size)
		}
	case macho.LoadCmdDylib, machoWeakDylib, machoReexport:
		var dylib macho.DylibCmd
		if command.decode(0, order, &dylib) {
			e.addLibrary(command.name(uint64(dylib.Name)))
		}
	case machoMain:
		var entry uint64
		if command.decode(8, order, &entry) {
			e.EntryPoint = fmt.Sprintf("%#x", entry)
		}
	}
}

// addMachOSection adds a section. One without an offset is zeros that the file does not hold.
func (e *Executable) addMachOSection(f image, name [16]byte, offset uint32, size uint64) {
	var content image
	if offset != 0 {
		content = f.part(uint64(offset), size)
	}
	e.addSection(cString(name[:]), size, content)
}

// readFatMachO reads a file that holds a program for each of several machines: what it says is of the first one. The
// class files of Java begin in the same way, and with a version where the number of machines is; it is larger.
func readFatMachO(f image) *Executable {
	var count uint32
	if !f.decode(4, binary.BigEndian, &count) || count == 0 || count > maxMachines {
		return nil
	}
	var exe *Executable
	var machines []string
	for i := range count {
		var part macho.FatArchHeader
		if !f.decode(8+machoPartSize*uint64(i), binary.BigEndian, &part) {
			break
		}
		if i == 0 {
			exe = readMachO(f.part(uint64(part.Offset), uint64(part.Size)))
		}
		machines = append(machines, part.Cpu.String())
	}
	if exe != nil {
		exe.Machine = strings.Join(machines, ", ")
	}
	return exe
}
