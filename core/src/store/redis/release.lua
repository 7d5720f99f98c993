-- Gives a lease back. KEYS: the cell. ARGV: the cell's first 20 bytes with its token, for how many milliseconds nobody shall load.
local key, hold = KEYS[1], tonumber(ARGV[2])
if redis.pcall('GETRANGE', key, 0, 19) ~= ARGV[1] then
    return 0
end
if hold == 0 and string.sub(ARGV[1], 4, 4) == 'L' then
    redis.call('UNLINK', key)
    return 1
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local nobody = (hold > 0 and '\1' or '\0') .. string.rep('\0', 7)
redis.call('SETRANGE', key, 12, nobody .. struct.pack('<I8', now + hold))
return 1
